"""The rollout engine in the trainer's process: a Transformers model, batched sampling with a key-value cache.

In: prompts, and the policy's weights under their Hugging Face names. Out: responses as `engine.RolloutEngine` promises
them. The trainer's own model does not generate, because Megatron-Core's inference needs CUDA; this engine runs wherever
PyTorch does, and its log-probs come from an implementation of the policy that shares no code with the trainer's.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megatron_gspo.rollout.cpu_layers import use_cpu_layers
from megatron_gspo.rollout.decoding import decode
from megatron_gspo.rollout.engine import RolloutEngine
from megatron_gspo.rollout.open_groups import Slot, filled, joined, open_slots
from megatron_gspo.rollout.weight_copy import WeightCopier
from megatron_gspo.types import OpenGroup, Response, SamplingSettings, UserError

SUPPORTED_MODEL_TYPES = ("qwen3", "qwen3_moe")


class LocalEngine(RolloutEngine):
    """Samples from a Transformers model whose weights are only ever set through `update_weights`."""

    def __init__(
        self,
        config_path: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_concurrent_responses: int = 256,
        return_routed_experts: bool = False,
    ) -> None:
        """Build the model, without weights.

        Args:
            config_path: Hugging Face checkpoint directory; only its `config.json` is read.
            dtype: what the model computes in. Log-probs are float32 either way.
            device: where the model and its key-value cache lie.
            max_concurrent_responses: rows of a decoding batch. More responses are sampled batch after batch.
            return_routed_experts: give each response the experts its tokens went to, as `routing.replay: r3` needs.

        Raises:
            UserError: when the directory holds no model this engine can run, or none with routes to return.
        """
        model = _build_model(config_path, dtype, torch.device(device))
        self._routers = _routers_in_depth_order(model, config_path) if return_routed_experts else []
        self._model: PreTrainedModel | None = model
        self._destinations = _parameters_by_checkpoint_name(model)
        self._max_concurrent_responses = max_concurrent_responses
        self._weight_version: int | None = None

    @property
    def weight_version(self) -> int:
        """The version last passed to `update_weights`. RuntimeError while there are no weights to sample from."""
        if self._weight_version is None:
            raise RuntimeError(
                "the rollout engine has no weights: update_weights has not succeeded yet, or it is closed"
            )
        return self._weight_version

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy each tensor into the model in place, converting its dtype; see `RolloutEngine.update_weights`."""
        self._weight_version = None
        missing, copier = dict(self._destinations), WeightCopier()
        for name, tensor in weights:
            destination = missing.pop(name, None)
            if destination is None:
                problem = "was given twice" if name in self._destinations else "is not a parameter of the rollout model"
                raise UserError(f"weights version {version}: {name} {problem}")
            if destination.shape != tensor.shape:
                raise UserError(
                    f"weights version {version}: {name} has shape {list(tensor.shape)}, "
                    f"the rollout model's config makes it {list(destination.shape)}"
                )
            copier.add(tensor, destination)
        if missing:
            raise UserError(
                f"weights version {version}: {len(missing)} of {len(self._destinations)} parameters are missing, "
                f"the first is {next(iter(missing))}"
            )
        copier.finish()
        self._weight_version = version

    def generate_until(
        self,
        groups: Sequence[OpenGroup],
        num_complete: int,
        settings: SamplingSettings,
        interrupt: threading.Event | None = None,
    ) -> list[OpenGroup]:
        """Sample until enough groups are complete; see `RolloutEngine.generate_until`.

        The same call with the same weights and seed gives the same responses, and leaves global random states alone.
        """
        version, model = self.weight_version, self._model
        assert model is not None, "an engine with a weight version has a model"
        generator = torch.Generator().manual_seed(settings.seed)
        slots = open_slots(groups)
        unfinished = Counter(slot.group for slot in slots)  # responses of each group

        def enough(batch: Sequence[Slot], has_ended: np.ndarray) -> bool:
            if interrupt is not None and interrupt.is_set():
                return True
            left = unfinished - Counter(slot.group for slot, ended in zip(batch, has_ended, strict=True) if ended)
            return len(groups) - len(left) >= num_complete

        sampled: list[tuple[Slot, Response]] = []
        for start in range(0, len(slots), self._max_concurrent_responses):
            batch = slots[start : start + self._max_concurrent_responses]
            if enough(batch, np.zeros(len(batch), dtype=bool)):
                break
            ends_early = functools.partial(enough, batch) if num_complete < len(groups) or interrupt else None
            responses = self._decode(model, batch, settings, generator, version, ends_early)
            unfinished -= Counter(
                slot.group for slot, response in zip(batch, responses, strict=True) if response.finish_reason != "abort"
            )
            sampled += zip(batch, responses, strict=True)
        return filled(groups, sampled)

    def _decode(
        self,
        model: PreTrainedModel,
        batch: Sequence[Slot],
        settings: SamplingSettings,
        generator: torch.Generator,
        version: int,
        enough: Callable[[np.ndarray], bool] | None,
    ) -> list[Response]:
        """One batch's responses, from their first token on."""
        place_of: dict[tuple[int, ...], int] = {}  # what several responses go on from is read once
        read_by = [place_of.setdefault(slot.token_ids, len(place_of)) for slot in batch]
        num_tokens_before = [slot.num_tokens for slot in batch]
        decoded = decode(
            model,
            list(place_of),
            read_by,
            settings,
            generator,
            self._routers,
            num_tokens_before=num_tokens_before,
            enough=enough,
        )
        return [
            joined(
                slot.so_far,
                Response(
                    prompt_id=slot.prompt.id,
                    token_ids=tokens.token_ids,
                    log_probs=tokens.log_probs,
                    finish_reason=tokens.finish_reason,
                    weight_version=version,
                    routed_experts=tokens.routed_experts,
                ),
                len(slot.prompt.token_ids),
            )
            for slot, tokens in zip(batch, decoded, strict=True)
        ]

    def release_memory(self) -> None:
        """See `RolloutEngine.release_memory`: its one copy of the weights is what the next ones are written to."""

    def take_counts(self) -> dict[str, float]:
        """Nothing happens to this engine that is worth counting."""
        return {}

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None
        self._routers = []
        self._destinations = {}
        self._weight_version = None


def _build_model(config_path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A Transformers model with uninitialised weights, made for sampling."""
    if not (config_path / "config.json").is_file():
        raise UserError(f"model.path: {config_path} holds no config.json; give a Hugging Face checkpoint directory")
    config = AutoConfig.from_pretrained(config_path)
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UserError(
            f"{config_path}/config.json: model_type is {config.model_type!r}, "
            f"the local rollout engine accepts {' and '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if config.use_sliding_window:
        raise UserError(
            f"{config_path}/config.json: use_sliding_window is true, the local rollout engine accepts false"
        )
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    model.eval().requires_grad_(False)
    if device.type == "cpu":
        use_cpu_layers(model)
    return model


def _routers_in_depth_order(model: PreTrainedModel, config_path: Path) -> list[Qwen3MoeTopKRouter]:
    """The router of each MoE layer. `modules()` yields layers from the first to the last, and dense ones have none."""
    routers = [module for module in model.modules() if isinstance(module, Qwen3MoeTopKRouter)]
    if not routers:
        raise UserError(
            f"routing.replay: r3 replays the rollout engine's routes, and the model of {config_path}/config.json has no "
            "MoE layer to route in; give off, or a qwen3_moe model"
        )
    return routers


def _parameters_by_checkpoint_name(model: PreTrainedModel) -> dict[str, Tensor]:
    """Where each tensor of a checkpoint goes: a parameter, or one expert's part of a fused one.

    Transformers 5 keeps a layer's experts in two tensors, `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], and
    writes each expert's three matrices to disk.
    """
    destinations: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        experts, separator, projection = name.rpartition(".experts.")
        if not separator:
            destinations[name] = parameter
            continue
        for expert, matrix in enumerate(parameter.unbind()):
            parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[projection]
            for part, destination in zip(parts, matrix.chunk(len(parts)), strict=True):
                destinations[f"{experts}.experts.{expert}.{part}.weight"] = destination
    return destinations
