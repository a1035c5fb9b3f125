"""The tiny models' tokenizer, built, saved, and loaded as any Hugging Face tokenizer is."""

import json
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from megatron_gspo.data.tokenizer import build_byte_tokenizer

REPOSITORY = Path(__file__).parents[3]
SHIPPED = REPOSITORY / "recipes/models/tiny_qwen3_moe"
LOADED = AutoTokenizer.from_pretrained(SHIPPED)


def test_token_ids_of_text_are_its_utf8_bytes() -> None:
    text = "3+4-7*2=\n é 日 \x00 \U0001f600"

    assert LOADED(text)["input_ids"] == list(text.encode())


@given(st.text())
def test_decoding_gives_back_any_text(text: str) -> None:
    encoding = LOADED(text, add_special_tokens=False, split_special_tokens=True)

    assert LOADED.decode(encoding["input_ids"]) == text


def test_special_tokens_have_ids_behind_the_bytes_and_are_skipped_in_decoding() -> None:
    assert LOADED.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [256, 257, 258]
    assert (LOADED.pad_token_id, LOADED.eos_token_id) == (256, 258)
    assert LOADED.decode([257, ord("0"), 258, 256], skip_special_tokens=True) == "0"


def test_chat_template_writes_chatml_and_opens_the_assistants_turn() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]

    rendered = LOADED.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("tokenizer", [build_byte_tokenizer(), LOADED], ids=["built", "loaded"])
def test_vocabulary_fits_the_tiny_models(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == 259
    assert AutoConfig.from_pretrained(SHIPPED).vocab_size == 272


def test_the_shipped_model_is_what_the_tool_writes(tmp_path: Path) -> None:
    runpy.run_path(str(REPOSITORY / "tools/make_tiny_model.py"))["write_tiny_model"](tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in SHIPPED.iterdir())
    for path in tmp_path.iterdir():
        assert _content(path) == _content(SHIPPED / path.name), path.name


def _content(path: Path) -> object:
    if path.suffix != ".json":
        return path.read_text()
    content = json.loads(path.read_text())
    content.pop("transformers_version", None)
    return content
