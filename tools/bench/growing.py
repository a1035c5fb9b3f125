"""A training step of a given size in processes forked for it, and what time and memory should come to by formula.

In: a `Size`. Out: processor seconds of its steps, the mean of its ranks; bytes of tensors at a step's peak, those of the
fullest; and its mean log-prob at first. One process a rank; all of a size's ranks are told to step together. Responses
have one length, so that more tokens are more responses; micro-batches hold all of a rank's.
"""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection, Recipe, load_recipe
from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.launch import free_port
from megatron_gspo.memory.activations import FLOAT32, Activations
from megatron_gspo.memory.estimate import static_memory
from megatron_gspo.memory.shapes import ModelShapes
from megatron_gspo.routing.tap import RoutingTaps
from megatron_gspo.training.assembly import build_models, reinforcement_learning_rate
from megatron_gspo.training.experience import MiniBatch, pack_samples
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.optimizer import build_trainable_policy
from megatron_gspo.training.step import MiniBatchLoss, update_policy
from megatron_gspo.training.totals import Totals
from tools.bench import models

LENGTH = 128  # tokens of a response with its prompt
SHAPES = {
    "vocab_size": 272,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
AXES = ("tokens", "experts", "layers", "ranks")
PEAK_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class AsRouted(Activations):
    """With the rows that there are: the planner's margin for uneven routes says nothing of growth."""

    load: float

    @property
    def expert_rows(self) -> int:
        """T: of the dispatched rows, `load` times an even share."""
        return round(self.load * self.sequence_tokens * self.shapes.top_k * self.parallel.expert_tensor_size)


@dataclass(frozen=True)
class Size:
    """What is made larger."""

    tokens: int = 512  # of a step, on all ranks together
    experts: int = 8
    layers: int = 2
    ranks: int = 1  # which share the tokens, and the experts

    @property
    def shapes(self) -> ModelShapes:
        """Of the whole model."""
        return ModelShapes.of(models.config(**self.model_options).to_dict())

    @property
    def model_options(self) -> dict[str, int]:
        """For `models.config`."""
        return SHAPES | {"num_experts": self.experts, "num_hidden_layers": self.layers}

    @property
    def shared_parameters(self) -> int:
        """Those of the model's matrices that every rank has: attention, routers, embedding and output layer."""
        of = self.shapes
        attention, router = of.hidden * (2 * of.query + 2 * of.key_value), of.hidden * of.experts
        return self.layers * (attention + router) + 2 * of.vocabulary * of.hidden

    @property
    def expert_parameters(self) -> int:
        """Those of the experts that one rank has."""
        of = self.shapes
        return self.layers * of.experts // self.ranks * 3 * of.hidden * of.expert_width

    def causes(self) -> tuple[float, float, float, float]:
        """What time is spent on, on one rank: operations of matrix products, parameters updated, layers, once.

        Of what all ranks have, each updates its share: the optimizer is distributed.
        """
        of, tokens = self.shapes, self.tokens / self.ranks
        expert = 3 * of.hidden * of.expert_width
        active = self.shared_parameters - of.vocabulary * of.hidden + self.layers * of.top_k * expert
        pairs = tokens * LENGTH
        operations = 6 * active * tokens + 12 * self.layers * of.query * pairs / 2
        updated = self.shared_parameters / self.ranks + self.expert_parameters
        return operations, updated, float(self.layers), 1.0

    def held_bytes(self) -> int:
        """What a rank holds between steps: parameters, gradients, and its share of Adam's moments."""
        static = static_memory(self.shapes, parallel_section(self.ranks), FLOAT32, 0, None)
        return static.parameters + static.gradients + static.optimizer

    def bytes(self, load: float = 1.0) -> int:
        """What the fullest rank's tensors take at a step's peak, by `megatron_gspo.memory`'s terms for layers on a CPU.

        That is what it holds, and the more of two that are never there together: what the forward pass keeps, with the
        gradients passing through a layer; and the copy of the gradients that gloo sums over ranks (PyTorch's
        ProcessGroupGloo clones the input of reduce_scatter), which are those of what all ranks have.

        Args:
            load: rows of that rank's experts, as a multiple of an even share; random routers are not even.
        """
        layout = parallel_section(self.ranks)
        tokens = self.tokens // self.ranks
        kept = AsRouted(self.shapes, layout, FLOAT32, "none", tokens, cuda=False, load=load)
        backward = self.layers * kept.layer(is_moe=True) + kept.passing(is_moe=True)
        reduced = FLOAT32 * self.shared_parameters if self.ranks > 1 else 0
        return self.held_bytes() + max(backward, reduced)


class Growing:
    """Steps of one size; a process a rank, until closed. All of `worlds`, each of as many ranks, step at once."""

    def __init__(self, size: Size, worlds: int = 1) -> None:
        self.size = size
        fork = multiprocessing.get_context("fork")
        ports = [free_port() for _ in range(worlds)]
        places = list(itertools.product(ports, range(size.ranks)))
        pipes = [fork.Pipe() for _ in places]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            fork.Process(target=_steps, args=(size, rank, port, theirs), daemon=True)
            for (port, rank), (_, theirs) in zip(places, pipes, strict=True)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # so that a process that ends is heard
        first = self._hear()
        self.mean_log_prob = sum(log_prob for log_prob, _ in first) / worlds
        self.load = max(load for _, load in first)

    def step(self) -> float:
        """Processor seconds of a step, the mean of the ranks: the largest of eight short times is mostly chance."""
        return statistics.fmean(self._ask("step"))

    def peak_bytes(self) -> int:
        """Bytes of tensors at a step's peak, on the rank that has most. The first step makes moments: ask later."""
        return int(max(self._ask("peak")))

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.send("end")
        for process in self._processes:
            process.join()

    def _ask(self, what: str) -> list[float]:
        for connection in self._connections:
            connection.send(what)
        return self._hear()

    def _hear(self) -> list[Any]:
        return [connection.recv() for connection in self._connections]


def _steps(size: Size, rank: int, port: int, connection: Connection) -> None:
    """A rank's process: says its part of the mean log-prob and the load, then a step's seconds or peak bytes, as asked."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size.ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    with tempfile.TemporaryDirectory() as directory:
        recipe = write_recipe(size, Path(directory))
        parallel.initialize_distributed()
        parallel.initialize_model_parallel(recipe.parallel, recipe.seed)
        before = held_bytes()
        policy = build_trainable_policy(build_models(recipe), recipe, reinforcement_learning_rate(recipe))
    samples = models.samples([LENGTH] * (size.tokens // LENGTH), vocabulary=256)
    num_response_tokens = sum(len(sample.response_token_ids) for sample in samples)
    own = samples[rank :: size.ranks]
    batch = MiniBatch(pack_samples(own, recipe, pad_token_id=0), len(samples), num_response_tokens)
    with RoutingTaps(policy.models).record(batch.micro_batches) as session:
        old = token_log_probs(policy.chunks, batch.micro_batches, temperature=1.0)
    own_log_probs = float(sum(log_probs.double().sum() for log_probs in old)) / num_response_tokens
    connection.send((own_log_probs, load_of_the_fullest([routes.by_layer for routes in session.natural_routes], size)))
    numbers = itertools.count(1)

    def step() -> None:
        loss = MiniBatchLoss(recipe, batch, old, None)
        update_policy(policy, batch, loss, SkippedUpdates(0), next(numbers), Totals(), measure_mismatch=False)

    while (question := connection.recv()) != "end":
        if question == "peak":
            held = held_bytes() - before
            connection.send(held + min(grown_bytes(step) for _ in range(PEAK_STEPS)))
        else:
            started = time.process_time()
            step()
            connection.send(time.process_time() - started)
    parallel.shutdown()


def load_of_the_fullest(routes: Sequence[Tensor], size: Size) -> float:
    """Rows of the fullest rank's experts as a multiple of an even share. A collective.

    Args:
        routes: of this rank's tokens, one a micro-batch, [layers, S, K].
    """
    experts = torch.cat([each.flatten() for each in routes])
    rows = torch.bincount(experts.int(), minlength=size.experts)
    torch.distributed.all_reduce(rows)
    of_ranks = rows.view(size.ranks, -1).sum(1)  # experts lie on ranks in their order
    return float(of_ranks.max() / of_ranks.double().mean())


def held_bytes() -> int:
    """Bytes of memory behind all tensors that Python knows of; what two share counts once."""
    gc.collect()
    # By type: asking an object what it is wakes modules that load themselves when they are used.
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.device.type == "cpu"]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr()}.values())


def grown_bytes(function: Callable[[], object]) -> int:
    """The most bytes that `function` has of PyTorch's allocator at a time, beyond what was there before it.

    Resident memory would add what the C library keeps for later and pages of programs run for the first time. The
    profiler does not hear of what gloo's thread frees, so now and then it says too much: take the least of several.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    result = profile.profiler.kineto_results if profile.profiler else None
    assert result is not None, "the profiler has run"
    changes = [(event.start_ns(), event.nbytes()) for event in result.events() if event.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])  # stable: events of one nanosecond stay in their order
    return max(itertools.accumulate((num_bytes for _, num_bytes in changes), initial=0))


def parallel_section(ranks: int) -> ParallelSection:
    """Experts and data are shared out over `ranks`."""
    return ParallelSection(expert=ranks, expert_tensor=1, data=ranks)


def write_recipe(size: Size, directory: Path) -> Recipe:
    """The recipe of a step of this size, with random weights."""
    (directory / "config.json").write_text(json.dumps(models.config(**size.model_options).to_dict()))
    build_byte_tokenizer().save_pretrained(directory)
    (directory / "recipe.yaml").write_text(
        f"""
model: {{path: {directory}, dtype: float32}}
data: {{train: arithmetic_chain}}
objective: {{name: gspo}}
parallel: {{expert: {size.ranks}, data: {size.ranks}}}
routing: {{measure: false}}
rollout: {{responses_per_prompt: 4, max_prompt_tokens: 16, max_response_tokens: {LENGTH - 16}}}
training:
  {{steps: 1000, prompts_per_step: 8, mini_batches: 1, tokens_per_micro_batch: {size.tokens}, learning_rate: 1.0e-6}}
"""
    )
    return load_recipe(directory / "recipe.yaml")


def fitted(causes: Sequence[Sequence[float]], seconds: Sequence[float]) -> np.ndarray:
    """The costs, none negative, by which `causes` [points, C] best give `seconds` [points], each point weighing alike.

    Least squares of relative errors, over every choice of the causes that cost something: there are few.
    """
    matrix = np.asarray(causes, dtype=np.float64) / np.asarray(seconds, dtype=np.float64)[:, None]
    ones, num_causes = np.ones(len(matrix)), matrix.shape[1]
    best, least = np.zeros(num_causes), float("inf")
    for count in range(1, num_causes + 1):
        for chosen in itertools.combinations(range(num_causes), count):
            scale = np.abs(matrix[:, chosen]).max(axis=0)
            costs = np.linalg.lstsq(matrix[:, chosen] / scale, ones, rcond=None)[0] / scale
            error = float(((matrix[:, chosen] @ costs - ones) ** 2).sum())
            if (costs >= 0).all() and error < least:
                best, least = np.zeros(num_causes), error
                best[list(chosen)] = costs
    return best


def exponent(factors: Sequence[float], values: Sequence[float]) -> float:
    """p of the power law value ∝ factor^p that fits best."""
    return float(np.polyfit(np.log(factors), np.log(values), 1)[0])
