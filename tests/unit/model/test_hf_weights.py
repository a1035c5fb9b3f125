"""Weights go to Megatron and back bit by bit; a file that does not fit the model is refused by name."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from megatron_gspo.config import ParallelSection
from megatron_gspo.model.build import build_policy
from megatron_gspo.model.hf_weights import (
    export_hf_weights,
    has_weights,
    initialize_weights,
    load_hf_weights,
    save_hf_checkpoint,
)
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.types import UserError
from tests.tiny_models import dense_config, model_section, moe_config, reference_model

CONFIGS = {
    "moe": moe_config(),
    "moe with dense layers": moe_config(mlp_only_layers=[0, 2]),
    "moe, tied embeddings": moe_config(tie_word_embeddings=True),
    "dense": dense_config(),
}
EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


def build(config: Qwen3Config | Qwen3MoeConfig, dtype: str = "float32") -> list[PolicyModel]:
    return build_policy(config, model_section(dtype=dtype), ParallelSection())


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    reference_model(CONFIGS["moe"]).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("file_size", ["1GB", "20KB"], ids=["one file", "many files"])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_bit_equal(name: str, file_size: str, tmp_path: Path):
    reference_model(CONFIGS[name]).save_pretrained(tmp_path, max_shard_size=file_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (file_size == "20KB")
    chunks = build(CONFIGS[name])
    load_hf_weights(chunks, tmp_path)
    assert_bit_equal(dict(export_hf_weights(chunks)), stored_tensors(tmp_path))


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000], ids=["one file", "many files"])
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_loads_a_saved_checkpoint(name: str, shard_bytes: int, tmp_path: Path):
    template, saved = tmp_path / "template", tmp_path / "saved"
    reference = reference_model(CONFIGS[name])
    reference.save_pretrained(template)
    (template / "tokenizer.json").write_text("{}")
    chunks = build(CONFIGS[name])
    load_hf_weights(chunks, template)
    save_hf_checkpoint(chunks, saved, template, shard_bytes=shard_bytes)
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert_bit_equal(dict(loaded.state_dict()), dict(reference.state_dict()))
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert not [path.name for path in saved.iterdir() if "incomplete" in path.name]
    assert all(file.stat().st_size < shard_bytes + 10_000 for file in saved.glob("*.safetensors"))


def test_saving_replaces_the_weights_that_were_there_and_says_their_dtype(checkpoint: Path):
    chunks = build(CONFIGS["moe"], dtype="bfloat16")
    load_hf_weights(chunks, checkpoint)
    expected = {name: tensor.bfloat16() for name, tensor in stored_tensors(checkpoint).items()}
    save_hf_checkpoint(chunks, checkpoint, checkpoint, shard_bytes=40_000)
    assert_bit_equal(stored_tensors(checkpoint), expected)
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_exported_weight_that_is_copied_outlives_a_change_of_the_model(checkpoint: Path):
    chunks = build(CONFIGS["moe"])
    load_hf_weights(chunks, checkpoint)
    copies = {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}
    initialize_weights(chunks, seed=1, initializer_range=0.1)
    assert_bit_equal(copies, stored_tensors(checkpoint))


def test_a_layers_experts_leave_in_the_order_in_which_they_lie_in_memory():
    chunks = build(CONFIGS["moe"])
    exported = [
        (name, tensor) for name, tensor in export_hf_weights(chunks) if name.startswith("model.layers.1.mlp.exp")
    ]
    for projections in (("gate_proj", "up_proj"), ("down_proj",)):
        tensors = [tensor for name, tensor in exported if name.split(".")[-2] in projections]
        assert len(tensors) == 8 * len(projections)
        for tensor, following in pairwise(tensors):
            assert following.data_ptr() == tensor.data_ptr() + tensor.nbytes


def without(tensors: dict[str, Tensor]) -> None:
    del tensors[EXPERT]


def with_one_more(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.8.up_proj.weight"] = tensors[EXPERT]


def misshaped(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].T.contiguous()


def quantised(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT] = tensors[EXPERT].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, rf"{EXPERT} is missing"),
        (
            with_one_more,
            r"model\.safetensors: the tensor model\.layers\.1\.mlp\.experts\.8\.up_proj\.weight is surplus",
        ),
        (misshaped, rf"model\.safetensors: the tensor {EXPERT} has shape \[32, 16\].*\[16, 32\]"),
        (quantised, rf"model\.safetensors: the tensor {EXPERT} is I8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_and_no_weight_changes(
    checkpoint: Path, change: Callable[[dict[str, Tensor]], None], message: str
):
    chunks = build(CONFIGS["moe"])
    initialize_weights(chunks, seed=1, initializer_range=0.1)
    before = {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_hf_weights(chunks, checkpoint)
    assert_bit_equal(dict(export_hf_weights(chunks)), before)


def test_a_tied_model_may_store_its_output_layer_once_more(tmp_path: Path):
    reference_model(CONFIGS["moe, tied embeddings"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = dict(tensors)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    chunks = build(CONFIGS["moe, tied embeddings"])
    load_hf_weights(chunks, tmp_path)
    assert_bit_equal(dict(export_hf_weights(chunks)), expected)


def test_files_that_cannot_be_read_are_named(checkpoint: Path):
    chunks = build(CONFIGS["moe"])
    weights, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    weights.rename(checkpoint / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="half written"):
        load_hf_weights(chunks, checkpoint)
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"names model-00002-of-00002\.safetensors, which does not exist"):
        load_hf_weights(chunks, checkpoint)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="not a file of that directory"):
        load_hf_weights(chunks, checkpoint)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json is not an index"):
        load_hf_weights(chunks, checkpoint)
    index.unlink()
    weights.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        load_hf_weights(chunks, checkpoint)


def test_a_checkpoint_whose_writing_was_broken_off_is_not_taken_for_a_configuration(checkpoint: Path):
    (checkpoint / ".incomplete").mkdir()
    assert has_weights(checkpoint)
    (checkpoint / "model.safetensors").rename(checkpoint / ".incomplete" / "model.safetensors")
    with pytest.raises(UserError, match="broken off"):
        has_weights(checkpoint)


def test_only_a_configuration_gives_random_weights_and_pickles_are_refused(checkpoint: Path):
    assert has_weights(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    assert not has_weights(checkpoint)
    chunks = build(CONFIGS["moe"])
    initialize_weights(chunks, seed=4, initializer_range=0.1)
    weights = dict(export_hf_weights(chunks))
    assert torch.equal(weights["model.norm.weight"], torch.ones(32))
    drawn = torch.cat([weight.flatten() for name, weight in weights.items() if "norm" not in name])
    assert abs(float(drawn.mean())) < 2e-3 and abs(float(drawn.std()) - 0.1) < 2e-3
    assert not torch.equal(weights[EXPERT], weights[EXPERT.replace("5", "6")])
    (checkpoint / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="only safetensors"):
        has_weights(checkpoint)
