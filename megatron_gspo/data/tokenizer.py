"""The tokenizer of the tiny models: one token a byte, so one a character in ASCII, and lossless for any text.

In: nothing. Out: a tokenizer that saves, loads and behaves like Qwen's (a byte-level BPE, ChatML turns, `<|im_end|>` ends a
response), without merges: token ids 0 to 255 are the bytes themselves.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<|endoftext|>"
TURN_START_TOKEN = "<|im_start|>"
EOS_TOKEN = "<|im_end|>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{TURN_START_TOKEN}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{EOS_TOKEN}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{TURN_START_TOKEN}assistant\n{{% endif %}}"
)


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer: 256 bytes, then padding, start of turn, and end of turn, which is the end of sequence."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_characters(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Added here, in this order, so that their ids are 256, 257 and 258.
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (PAD_TOKEN, TURN_START_TOKEN, EOS_TOKEN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens=[TURN_START_TOKEN],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _byte_characters() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte (GPT-2's table).

    A byte that is a printable Latin-1 character stands for itself; the others take the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    replaced = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    characters.update({chr(256 + position): byte for position, byte in enumerate(replaced)})
    return characters
