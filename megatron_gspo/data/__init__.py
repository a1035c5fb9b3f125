"""Problems, prompts and packing: everything between a data set and a packed micro-batch.

`tasks` generates problems and `problem_files` reads them; `prompts` walks over either and tokenizes; `demonstrations` does
the same for the supervised cold start; `packing` arranges samples into micro-batches; `tokenizer` builds the byte-level
tokenizer of the tiny models.
"""
