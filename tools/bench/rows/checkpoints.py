"""A run's checkpoint, saved and loaded, beside plain files of as many bytes: written and on the disk, read from the disk.

Eight experts of Qwen3-30B-A3B's shape on one rank: weights in float32, the optimizer's copy of them and its two moments.
Saving includes what makes a checkpoint whole: digests of all files, and their renaming; loading includes their
verification. Both sides of a load read files that the kernel has dropped from memory. All is timed by the clock on the
wall. The stall is how long the run stands still when it saves in the background, where nothing else wants the processor;
rollouts, beside which its tensors are copied, are not part of it.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from megatron_gspo import parallel
from megatron_gspo.config import load_recipe
from megatron_gspo.training.assembly import Run, assemble
from megatron_gspo.training.checkpoint import load_checkpoint
from megatron_gspo.training.checkpoint_saver import CheckpointSaver
from megatron_gspo.training.checkpoint_store import CheckpointStore
from megatron_gspo.training.guards import SkippedUpdates
from megatron_gspo.training.resume import find_checkpoint
from tools.bench import models
from tools.bench.files import CLOCK, forget_cached, read_raw, write_raw
from tools.bench.harness import Bench, calls

RECIPE = Path(__file__).resolve().parents[3] / "recipes/tiny_gspo.yaml"
SHAPES = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 8, "num_hidden_layers": 1}


def measure(bench: Bench) -> None:
    """Saving, loading, and the stall."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        run = start(Path(directory))
        store = CheckpointStore(Path(directory) / "checkpoints")
        check_what_is_saved(bench, run, Path(directory))
        waiting = Saves(run, store, in_background=False)
        waiting.save()
        num_bytes = sum(file.stat().st_size for file in store.path(1).iterdir())
        raw = Path(directory) / "raw" / "file"
        raw.parent.mkdir()
        data = torch.randint(256, (num_bytes,), dtype=torch.uint8)
        sides = {
            "save": waiting.save,
            "write": partial(write_raw, raw, data, sync=True),
            "load": partial(load, run, store),
            "read": partial(read, raw, data),
        }
        times = bench.alternate(sides, clock=CLOCK)
        name = "save: plain write + fsync's time / ours"
        bench.figure(name, times.ratio("write", "save"), better="higher", aim=0.8)
        name = "load: plain write + fsync's time / ours"
        bench.figure(name, times.ratio("write", "load"), better="higher", aim=0.8)
        bench.figure("load: a plain read's time / ours", times.ratio("read", "load"), better="higher", aim=0.8)
        beside = Saves(run, store, in_background=True)
        beside.save()
        parts = [beside.parts() for _ in range(2 * bench.rounds)]
        stalls = [stall / (stall + rest) for stall, rest in parts]
        bench.figure("stall of a background save / the save", stalls, better="lower", aim=0.05)
        bench.note("a background save, the run's thread: " + calls(beside.start))
        beside.finish()
        bench.note("a load: " + calls(partial(load, run, store)))
        bench.profile(waiting.save, repeats=1)
        bench.note(f"{num_bytes / 2**20:.0f} MiB on the disk")
        run.close()
        parallel.shutdown()


class Saves:
    """Saves a run, as one step after the other."""

    def __init__(self, run: Run, store: CheckpointStore, *, in_background: bool) -> None:
        self._run, self._steps = run, itertools.count(max(store.steps(), default=0) + 1)
        self._saver = CheckpointSaver(store, keep=1, in_background=in_background)

    def save(self) -> None:
        """Until it is whole."""
        self.start()
        self.finish()

    def parts(self) -> tuple[float, float]:
        """Seconds of a background save: while the run stands still, and from then on."""
        started = CLOCK()
        self.start()
        goes_on = CLOCK()
        self.finish()
        return goes_on - started, CLOCK() - goes_on

    def finish(self) -> None:
        """Wait until it is whole. The one before it is deleted beside a run, so neither side's deletion is timed."""
        self._saver.finish()
        with CLOCK.stopped():
            self._saver.wait_until_deleted()

    def start(self) -> None:
        """Begin the next step's."""
        step = next(self._steps)
        self._saver.save(self._run, step, SkippedUpdates(0), {"step": step})


def start(directory: Path) -> Run:
    """A run with moments that are not 0, as after an update."""
    models.write_checkpoint(directory / "model", **SHAPES)
    recipe = load_recipe(RECIPE, [f"model.path={directory / 'model'}"])
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(recipe.parallel, recipe.seed)
    run = assemble(recipe)
    for optimizer in run.policy.optimizer.chained_optimizers:
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    for moment in moments(run).values():
        moment.uniform_()
    gc.collect()
    gc.freeze()  # as the program does: Megatron collects garbage in every save
    return run


def moments(run: Run) -> Mapping[str, torch.Tensor]:
    """Adam's, live."""
    return {
        f"{number}.{index}.{name}": state[name]
        for number, optimizer in enumerate(run.policy.optimizer.chained_optimizers)
        for index, state in enumerate(optimizer.optimizer.state.values())
        for name in ("exp_avg", "exp_avg_sq")
    }


def held(run: Run) -> dict[str, torch.Tensor]:
    """Copies of weights and moments."""
    weights = {name: weight for model in run.policy.models for name, weight in model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in (*weights.items(), *moments(run).items())}


def check_what_is_saved(bench: Bench, run: Run, directory: Path) -> None:
    """What was changed after the save comes back; a save beside the run holds what the run was when it began."""
    before = held(run)
    stores = {name: CheckpointStore(directory / name) for name in ("waited", "beside")}
    Saves(run, stores["waited"], in_background=False).save()
    with CheckpointSaver(stores["beside"], keep=1, in_background=True) as saver:
        saver.save(run, 1, SkippedUpdates(0), {"step": 1})
        saver.wait_until_copied()
        with torch.no_grad():
            for tensor in (*moments(run).values(), *run.policy.models[0].parameters()):
                tensor.zero_()
    found = [tensors(store.path(1)) for store in stores.values()]
    bench.identical("tensors saved beside the run and waiting", *found)
    load(run, stores["waited"])
    bench.identical("weights and moments, saved and loaded", held(run), before)


def tensors(checkpoint: Path) -> Mapping[str, torch.Tensor]:
    """All that a checkpoint holds."""
    found = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def load(run: Run, store: CheckpointStore) -> None:
    """From the disk."""
    forget_cached(store.directory)
    found = find_checkpoint(store, run.recipe, None)
    load_checkpoint(run, found.path, found.state, SkippedUpdates(0))


def read(file: Path, into: torch.Tensor) -> None:
    """From the disk."""
    forget_cached(file.parent)
    read_raw(file, into)
