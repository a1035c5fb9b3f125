"""A reward that a model of random weights gets in part, so that its updates have a gradient."""


def even_length(prompt: object, response_text: str, finished: bool) -> float:
    del prompt, finished
    return float(len(response_text.encode()) % 2 == 0)
