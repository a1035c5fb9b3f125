"""On one GPU: a step at Qwen3-30B-A3B's true layer shapes, log-probs beside Liger's, a tiny model beside the CPU's.

    python tools/bench/gpu.py [--parts same log_probs step] [--tokens 16384 65536] [--layers N] [--steps 5]     on a GPU
    python tools/bench/gpu.py --tiny                                             on any machine, its logic alone

`same` holds the log-probs, entropies, loss and gradients of a tiny bfloat16 model against the CPU's (`gpu_same.py`).
`log_probs` measures log-prob and entropy against the naive form and Liger's fused kernel (`gpu_log_probs.py`; Liger
where `liger_kernel` can be imported: `bash tools/bench/install_peers.sh` installs it where there is a GPU, and
`.venv-peers/bin/python tools/bench/gpu.py` finds it). `step` makes this project's own step (`training/step.py`) with
as many layers as fit where `--layers` does not say: forward and backward of packed responses of 4,096 tokens, GSPO's
loss, and the optimizer. The first step is not counted. Without a GPU it says what it would measure; `--tiny` runs
every line that a CPU can at shapes of no interest, and reports no time.

MFU counts what the mathematics needs over the GPU's dense bfloat16 peak: 6 operations a parameter of the layers and
token, 6 a parameter of the output layer and response token, and 12 · heads · head size a layer and pair of tokens that
attend to each other, half of them under the causal mask. A few layers with the whole output layer are not the whole
model, so MFU is also given without the operations of the output layer; its time stays in.

The test suite is written for the CPU: its ranks are many to a machine, where NCCL wants a GPU each, and its runs are
forked from a process that has looked at the GPU. On a GPU's machine it is run as

    CUDA_VISIBLE_DEVICES= bash tools/test.sh

With the GPU visible only the tests of this script are meant to pass, and compute on it:

    python -m pytest tests/end_to_end/test_bench_gpu.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megatron_gspo import parallel  # noqa: E402
from tools.bench import gpu_log_probs, gpu_same, gpu_step  # noqa: E402

PARTS = ("same", "log_probs", "step")
TESTS = "CUDA_VISIBLE_DEVICES= bash tools/test.sh"
CUDA_TEST = "python -m pytest tests/end_to_end/test_bench_gpu.py"


def main() -> int:
    """Measure, or say what would be measured."""
    arguments = parser().parse_args()
    if arguments.write_cpu:
        gpu_same.write_cpu(arguments.write_cpu)
        return 0
    if not torch.cuda.is_available() and not arguments.tiny:
        print(
            "No GPU here. On one this holds the log-probs, entropies, loss and gradients of a tiny bfloat16 model "
            "against the CPU's; measures log-prob and entropy at vocabulary 151,936 beside the naive form and Liger: "
            "milliseconds, peak memory, and the floor's matrix products; and measures a GSPO step at Qwen3-30B-A3B's "
            f"layer shapes, as many layers as fit, at {' and '.join(f'{tokens:,}' for tokens in arguments.tokens)} "
            "packed tokens: tokens/s, MFU, peak GiB and the share of each operator. --tiny runs these lines here at "
            f"tiny shapes. The test suite is for the CPU, on a GPU's machine too: {TESTS}"
        )
        return 0
    if "same" in arguments.parts:
        gpu_same.compare_with_cpu()
    if "log_probs" in arguments.parts:
        gpu_log_probs.measure_log_probs(gpu_log_probs.TINY if arguments.tiny else gpu_log_probs.Sizes())
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # as many layers as fit is asked of the GPU
    if "step" in arguments.parts:
        measure_steps(arguments)
    print(f"The test suite is for the CPU: {TESTS}. Of it, on the GPU: {CUDA_TEST}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 65_536], help="packed tokens of a step")
    parser.add_argument("--layers", type=int, help="layers of the model (default: as many as fit)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on any machine; reports no time")
    parser.add_argument("--write-cpu", type=Path, help=argparse.SUPPRESS)  # what a tiny model computes, to this file
    return parser


def measure_steps(arguments: argparse.Namespace) -> None:
    """Measure a training step of every size that was asked for, and report it."""
    token_counts = [256] if arguments.tiny else arguments.tokens
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        changes = gpu_step.tiny_shapes() if arguments.tiny else {}
        layers = arguments.layers or (2 if arguments.tiny else gpu_step.most_layers(directory, max(token_counts)))
        recipe = gpu_step.write_recipe(directory, changes | {"num_hidden_layers": layers}, max(token_counts))
        policy = gpu_step.build(recipe)
        for tokens in token_counts:
            measured = gpu_step.measure(policy, recipe, tokens, arguments.steps)
            gpu_step.report(measured, layers, shows_times=not arguments.tiny)
        parallel.shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
