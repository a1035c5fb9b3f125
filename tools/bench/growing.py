"""A training step of a given size in processes forked for it, and what time and memory should come to by formula.

In: a `Size`. Out: processor seconds of its steps, bytes at its peak, and the loss it began with. One process a rank; all
of a size's ranks are told to step together, and what is reported is the slowest one's. Responses have one length, so that
more tokens are more responses; micro-batches hold all of a rank's.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection, Recipe, load_recipe
from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.launch import free_port
from megatron_gspo.memory.activations import FLOAT32, Activations
from megatron_gspo.memory.estimate import static_memory
from megatron_gspo.memory.shapes import ModelShapes
from megatron_gspo.training.assembly import build_models, reinforcement_learning_rate
from megatron_gspo.training.experience import MiniBatch, pack_samples
from megatron_gspo.training.forward import token_log_probs
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.optimizer import build_trainable_policy
from megatron_gspo.training.step import MiniBatchLoss, update_policy
from megatron_gspo.training.totals import Totals
from tools.bench import models
from tools.bench.memory import resident_bytes, set_peak_back

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

    def causes(self) -> tuple[float, float, float, float]:
        """What time is spent on, on one rank: operations of matrix products, parameters updated, layers, once."""
        of, tokens = self.shapes, self.tokens / self.ranks
        expert = 3 * of.hidden * of.expert_width
        active = self.shared_parameters - of.vocabulary * of.hidden + self.layers * of.top_k * expert
        pairs = tokens * LENGTH
        operations = 6 * active * tokens + 12 * self.layers * of.query * pairs / 2
        parameters = self.shared_parameters + self.layers * of.experts / self.ranks * expert
        return operations, parameters, float(self.layers), 1.0

    def exchanged_bytes(self) -> float:
        """What leaves a rank: tokens for experts elsewhere and back, forward and backward; and gradients, summed."""
        of, elsewhere = self.shapes, (self.ranks - 1) / self.ranks
        dispatched = 4 * self.layers * self.tokens / self.ranks * of.top_k * of.hidden
        return FLOAT32 * elsewhere * (dispatched + 2 * self.shared_parameters)

    def bytes(self) -> float:
        """What a rank takes at its peak beyond the program: `megatron_gspo.memory`'s terms for layers on a CPU."""
        layout = parallel_section(self.ranks)
        static = static_memory(self.shapes, layout, FLOAT32, 0, None)
        kept = Activations(self.shapes, layout, FLOAT32, "none", self.tokens // self.ranks, cuda=False)
        layers = self.layers * kept.layer(is_moe=True) + kept.passing(is_moe=True)
        return float(static.parameters + static.gradients + static.optimizer + layers)


class Growing:
    """Steps of one size; a process a rank, until closed."""

    def __init__(self, size: Size) -> None:
        self.size = size
        port = free_port()
        fork = multiprocessing.get_context("fork")
        pipes = [fork.Pipe() for _ in range(size.ranks)]
        self._connections = [ours for ours, _ in pipes]
        self._processes = [
            fork.Process(target=_steps, args=(size, rank, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # so that a process that ends is heard
        self.loss = sum(self._hear())

    def step(self) -> float:
        """Processor seconds of a step, on the rank that took most."""
        return max(self._ask("step"))

    def close(self) -> float:
        """End the processes. Returns the bytes at the peak, of the rank that took most."""
        peak = max(self._ask("end"))
        for process in self._processes:
            process.join()
        return peak

    def _ask(self, what: str) -> list[float]:
        for connection in self._connections:
            connection.send(what)
        return self._hear()

    def _hear(self) -> list[float]:
        return [connection.recv() for connection in self._connections]


def _steps(size: Size, rank: int, port: int, connection: Connection) -> None:
    """A rank's process: the loss at first, then the seconds of every step it is told to make, its peak at the end."""
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
        before = set_peak_back()
        policy = build_trainable_policy(build_models(recipe), recipe, reinforcement_learning_rate(recipe))
    samples = models.samples([LENGTH] * (size.tokens // LENGTH), vocabulary=256)
    num_response_tokens = sum(len(sample.response_token_ids) for sample in samples)
    own = samples[rank :: size.ranks]
    batch = MiniBatch(pack_samples(own, recipe, pad_token_id=0), len(samples), num_response_tokens)
    old = token_log_probs(policy.chunks, batch.micro_batches, temperature=1.0)
    connection.send(float(sum(log_probs.double().sum() for log_probs in old)) / num_response_tokens)
    for number in itertools.count(1):
        if connection.recv() == "end":
            break
        started = time.process_time()
        loss = MiniBatchLoss(recipe, batch, old, None)
        update_policy(policy, batch, loss, SkippedUpdates(0), number, Totals(), measure_mismatch=False)
        connection.send(time.process_time() - started)
    connection.send(float(resident_bytes("VmHWM") - before))
    parallel.shutdown()


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
    """The costs, none negative, by which `causes` [points, C] best give `seconds` [points], each point weighing as much.

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
