"""The policy's weights in Hugging Face's layout: into memory, to the local engine, to files, and through a process group.

Expert matrices of Qwen3-30B-A3B's shape, in bfloat16. The export is held against one copy of as many bytes; files against a
plain write of them, with and without waiting for the disk; the broadcast against gloo's own of pieces as large, between
the same two processes. The broadcast's receiver takes buckets as an SGLang server does (`receiver.py`); this side's code
is all of the trainer's. What waits is timed by the clock on the wall, what copies by processor time.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_gspo.config import SglangSection
from megatron_gspo.data.tokenizer import build_byte_tokenizer
from megatron_gspo.model.hf_weights import export_hf_weights, save_hf_checkpoint
from megatron_gspo.model.policy import PolicyModel
from megatron_gspo.rollout.local import LocalEngine
from megatron_gspo.rollout.sglang_http import SglangHttp
from megatron_gspo.rollout.weight_sync_broadcaster import WeightBroadcaster
from megatron_gspo.rollout.weight_sync_buckets import Bucket, pack
from megatron_gspo.rollout.weight_sync_disk import DiskWeightSync
from tools.bench import models
from tools.bench.files import CLOCK, delete, write_raw
from tools.bench.harness import Bench, calls, copy_probe
from tools.bench.receiver import Receiver, plain_broadcast

SHAPES = {
    "hidden_size": 2048,
    "intermediate_size": 768,
    "moe_intermediate_size": 768,
    "num_experts": 64,
    "num_hidden_layers": 1,
    "vocab_size": 272,
}
BUCKET_BYTES = SglangSection.model_fields["weight_bucket_bytes"].default  # as a recipe's
BROADCAST_BUCKET_BYTES = 32 * 2**20  # so that one layer has several, as a whole model has of a recipe's

Chunks = Sequence[PolicyModel]
Weights = Mapping[str, torch.Tensor]


def measure(bench: Bench) -> None:
    """Every way the weights take."""
    shapes = models.config(**SHAPES)
    chunks = [models.policy(shapes, dtype="bfloat16")]
    expected = {name: tensor.clone() for name, tensor in export_hf_weights(chunks)}
    num_bytes = sum(tensor.nbytes for tensor in expected.values())
    bench.note(
        f"{num_bytes / 2**20:.0f} MiB in {len(expected)} tensors; buckets of {BUCKET_BYTES // 2**20} MiB, in the broadcast of "
        f"{BROADCAST_BUCKET_BYTES // 2**20} MiB"
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        template = Path(directory) / "template"
        shapes.save_pretrained(template)
        build_byte_tokenizer().save_pretrained(template)
        measure_copies(bench, chunks, template, expected, num_bytes)
        measure_files(bench, chunks, Path(directory), expected, num_bytes)
        measure_broadcast(bench, chunks, Path(directory), expected)


def measure_copies(bench: Bench, chunks: Chunks, template: Path, expected: Weights, num_bytes: int) -> None:
    """Into buckets, and into the local engine's model."""
    kept: list[Bucket] = []

    def export() -> None:
        spare = [bucket.data for bucket in kept]
        kept[:] = pack(export_hf_weights(chunks), BUCKET_BYTES, spare)

    engine = LocalEngine(template, dtype=torch.bfloat16)
    local = partial(_given, engine, chunks)
    export()
    found = {name: tensor for bucket in kept for name, tensor in bucket.tensors().items()}
    bench.identical("weights in buckets and the policy's", found, expected)
    local()
    bench.identical("the local engine's weights and the policy's", engine_weights(engine), expected)
    sides = {"export": export, "local": local, "copy": copy_probe(num_bytes)}
    times = bench.alternate(sides, rounds=4 * bench.rounds)
    bench.figure("export into buckets: one copy's time / ours", times.ratio("copy", "export"), better="higher", aim=0.9)
    bench.figure("to the local engine: one copy's time / ours", times.ratio("copy", "local"), better="higher", aim=0.9)
    bench.profile(export)


def _given(engine: LocalEngine, chunks: Chunks) -> None:
    engine.update_weights(export_hf_weights(chunks), 1)


def engine_weights(engine: LocalEngine) -> Weights:
    """What the local engine samples from, by the names of its checkpoint."""
    return {name: tensor.clone() for name, tensor in engine._destinations.items()}


def measure_files(bench: Bench, chunks: Chunks, directory: Path, expected: Weights, num_bytes: int) -> None:
    """For servers that load them, and as a checkpoint for others, which is on the disk when it is said to be there."""
    sync, versions = DiskWeightSync(directory, "run"), itertools.count(1)
    checkpoint, template = directory / "checkpoint", directory / "template"
    data = torch.randint(256, (num_bytes,), dtype=torch.uint8)

    def save_checkpoint() -> None:
        aside = checkpoint.with_name("checkpoint.new")
        save_hf_checkpoint(chunks, aside, template)
        delete(checkpoint)
        with CLOCK.stopped():
            aside.rename(checkpoint)

    def publish() -> None:
        version = next(versions)
        sync.publish(export_hf_weights(chunks), version)
        with CLOCK.stopped():
            sync.forget_before(version)

    publish()
    check_files(bench, "servers", next(directory.glob("run.*")), expected)
    sides = {"servers": publish, "write": partial(write_raw, directory / "raw", data, sync=False)}
    times = bench.alternate(sides, rounds=2 * bench.rounds, clock=CLOCK)
    ratio = times.ratio("write", "servers")
    bench.figure("files for servers: plain write's time / ours, neither synced", ratio, better="higher", aim=0.7)
    save_checkpoint()
    check_files(bench, "others", checkpoint, expected)
    sides = {"checkpoint": save_checkpoint, "write": partial(write_raw, directory / "raw", data, sync=True)}
    times = bench.alternate(sides, rounds=2 * bench.rounds, clock=CLOCK)
    ratio = times.ratio("write", "checkpoint")
    bench.figure("checkpoint for others: plain write + fsync's time / ours", ratio, better="higher", aim=0.7)
    bench.note("files for servers: " + calls(publish))
    bench.note("checkpoint for others: " + calls(save_checkpoint))


def check_files(bench: Bench, reader: str, directory: Path, expected: Weights) -> None:
    """What was written for `reader` is the policy's."""
    found = {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}
    bench.identical(f"files for {reader} and the policy's weights", found, expected)


def measure_broadcast(bench: Bench, chunks: Chunks, directory: Path, expected: Weights) -> None:
    """Through a group with one receiver, from the export to the receiver's last word."""
    receiver = Receiver()
    broadcaster = WeightBroadcaster(
        [receiver.url],
        SglangHttp(receiver.key, 60.0),
        backend="gloo",
        bucket_bytes=BROADCAST_BUCKET_BYTES,
        timeout_s=60.0,
        restart=None,
    )

    def publish() -> None:
        broadcaster.publish(export_hf_weights(chunks), "run.1")
        fault = broadcaster.take_fault(receiver.url)
        assert fault is None, fault

    publish()
    receiver.asked("/save", {"path": str(directory / "received")})()
    bench.identical("weights that were received and the policy's", load_file(directory / "received"), expected)
    pieces = [bucket.data for bucket in pack(expected.items(), BROADCAST_BUCKET_BYTES)]
    sides = {"ours": publish, "gloo": plain_broadcast(receiver, pieces)}
    times = bench.alternate(sides, clock=lambda: time.process_time() + receiver.asked("/processor_time", {})())
    name = "broadcast: processor time of gloo's own / ours, both processes"
    bench.figure(name, times.ratio("gloo", "ours"), better="higher")
    times = bench.alternate(sides, rounds=2 * bench.rounds, clock=time.perf_counter)
    bench.figure("broadcast: gloo's own time / ours", times.ratio("gloo", "ours"), better="higher")
    bench.note("broadcast, the exporting thread: " + calls(publish))
    broadcaster.close()
    receiver.close()
