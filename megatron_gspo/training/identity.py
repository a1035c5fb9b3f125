"""What a run that goes on must share with the run that was saved.

In: the recipes of both, and their models. Out: nothing, or the first field that differs and may not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_gspo.config import Recipe
from megatron_gspo.model.build import read_hf_config
from megatron_gspo.types import UserError

#: Fields, or sections, that change how a run is computed, measured or kept, and not what it learns from.
MAY_DIFFER = (
    "parallel",
    "evaluation",
    "logging",
    "slurm",
    "warmstart",
    "data.eval",
    "model.path",  # where it lies; that it is the same model is checked by itself
    "model.spec",
    "model.recompute",
    "model.log_probs_chunk_tokens",
    "routing.measure",
    "routing.probe_every",
    "routing.probe_responses",
    "routing.routes_on_host",
    "rollout.max_concurrent_responses",
    "rollout.verify_weights",
    "rollout.sglang",  # other servers sample alike; that they compute in the same precision is checked by itself
    "reward.timeout_s",
    "training.steps",
    "training.save_every",
    "training.keep_checkpoints",
    "training.background_save",
    "training.max_skipped_updates",
    "training.tokens_per_micro_batch",
    "training.skip_zero_advantages",
)

_MODEL_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)


def model_identity(path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What makes two models in directories such as `path` the same one, weights apart; JSON types only."""
    config = read_hf_config(path)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {name: getattr(config, name, None) for name in _MODEL_FIELDS} | {
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()
    }


def require_same_model(checkpoint: Path, saved: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another model or vocabulary.

    Raises:
        UserError: naming the first thing that differs.
    """
    for name, value in saved.items():
        if found[name] == value:
            continue
        if name == "tokenizer":
            raise UserError(f"{checkpoint} is of another vocabulary: the tokenizer in {path} has other tokens")
        raise UserError(f"{checkpoint} is of another model: its {name} is {value!r}, that of {path} is {found[name]!r}")


def require_same_run(checkpoint: Path, saved: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse to go on with a recipe that would learn something else.

    Raises:
        UserError: naming the first field that differs and may not.
    """
    given = dict(_fields(recipe.model_dump(mode="json")))
    for name, value in _fields(saved):
        if name in given and given[name] != value and not _may_differ(name, recipe):
            raise UserError(
                f"{name} is {given[name]!r}, but {checkpoint} was saved with {value!r}; accepted: {value!r}"
            )


def differences(saved: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Every field that differs, in words."""
    given = dict(_fields(recipe.model_dump(mode="json")))
    return [f"{name} {given[name]!r} (was {value!r})" for name, value in _fields(saved) if given.get(name) != value]


def _may_differ(name: str, recipe: Recipe) -> bool:
    if name == "parallel.distributed_optimizer":
        return False  # with it the optimizer has a float32 copy of the parameters, and without it not always
    if name == "rollout.sglang.dtype":
        return False
    if name == "training.steps":
        return recipe.training.learning_rate_schedule == "constant"  # another decays over all steps
    if name == "model.path":
        return recipe.objective.kl_coefficient == 0  # else it holds the reference policy
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in MAY_DIFFER)


def _fields(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every field."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
