"""What this machine has, and what Megatron-Core 0.16.1 needs in order to run where there is no CUDA.

In: the machine. Out: a `Machine`, the device to compute on, and, after `prepare_megatron()`, a `megatron.core` that
imports and trains with gloo on a CPU.

Megatron-Core is used unmodified. It is written for CUDA throughout, so without CUDA a few names of `torch.cuda` get
stand-ins that do the obvious thing on a CPU, and the Megatron modules that ask for `device="cuda"` by name see a `torch`
that gives them the CPU. Nothing here intercepts tensor operations, so nothing here costs time in a training step. With
CUDA none of it applies.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Machine:
    """What one process finds on its machine; `doctor` prints it and `environment.json` keeps it."""

    num_gpus: int
    gpu_name: str | None
    gpu_memory_gib: float | None  # of the first GPU
    nccl: bool
    transformer_engine: str | None  # its version
    apex: bool  # NVIDIA's, with its CUDA extensions; the `apex` on PyPI is another project
    num_cores: int  # that this process may use
    memory_gib: float

    @property
    def has_cuda(self) -> bool:
        """Whether there is a GPU to compute on."""
        return self.num_gpus > 0

    @property
    def backend(self) -> str:
        """The torch.distributed backend that ranks talk through."""
        return "nccl" if self.has_cuda and self.nccl else "gloo"


@functools.cache
def detect_machine() -> Machine:
    """Look at this machine, once a process. Imports neither Transformer Engine nor Apex."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    properties = torch.cuda.get_device_properties(0) if num_gpus else None
    return Machine(
        num_gpus=num_gpus,
        gpu_name=properties.name if properties else None,
        gpu_memory_gib=properties.total_memory / 2**30 if properties else None,
        nccl=torch.distributed.is_nccl_available(),
        transformer_engine=_transformer_engine_version(),
        apex=importlib.util.find_spec("apex") is not None and importlib.util.find_spec("amp_C") is not None,
        num_cores=len(os.sched_getaffinity(0)),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
    )


def device() -> torch.device:
    """Where this rank's model and micro-batches live."""
    if detect_machine().has_cuda:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@functools.cache
def prepare_megatron() -> None:
    """Make `megatron.core` usable on this machine. Call it before anything imports `megatron.core`; again is harmless."""
    # tensor_parallel/layers.py: overlapping communication with sequence parallelism relies on one hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    has_cuda = detect_machine().has_cuda
    if not has_cuda:
        _stand_in_for_cuda()
    with warnings.catch_warnings(), contextlib.nullcontext() if has_cuda else _nothing_compiled():
        # Megatron says at every import that Apex is missing; `doctor` says it once.
        warnings.filterwarnings("ignore", message=".*Apex is not installed.*")
        warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    if detect_machine().transformer_engine is None:
        _stand_in_for_transformer_engine()
    if not has_cuda:
        _patch_modules_that_name_cuda()


class _Stream:
    """A CUDA stream and its events where everything runs in order.

    A class and not a function, because transformers annotates arguments with `torch.cuda.Stream | None`.
    """

    def __init__(self, *args: object, **options: object) -> None:
        del args, options

    def __eq__(self, other: object) -> bool:
        """There is one stream, so no work is ever on a side stream (token_dispatcher.py)."""
        return isinstance(other, _Stream)

    __hash__ = None  # type: ignore[assignment]

    def wait_stream(self, stream: _Stream) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self) -> _Stream:
        """An event that has already happened."""
        return self


def _stand_in_for_cuda() -> None:
    """Give the names of `torch.cuda` that Megatron uses a meaning on the CPU."""
    cuda: Any = torch.cuda
    # parallel_state.py, layers.py, router.py, param_and_grad_buffer.py, p2p_communication.py: `device=current_device()`
    cuda.current_device = lambda: torch.device("cpu")
    # token_dispatcher.py: copies the token counts to the host on a side stream
    cuda.Stream = _Stream
    cuda.current_stream = lambda *args: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    # p2p_communication.py: waits for the device after batched sends
    cuda.synchronize = lambda *args: None
    # tensor_parallel/random.py: the tracker of random states forks the generator of the device
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **options: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    # language_module.py: moves the tied embedding's copy on the last pipeline stage to the GPU
    torch.Tensor.cuda = lambda self, *args, **options: self  # type: ignore[method-assign]
    # optimizer.py, distrib_optimizer.py, clip_grads.py: compare `.type()` with 'torch.cuda.FloatTensor' and its like
    torch.Tensor.type = _type_as_on_cuda(torch.Tensor.type)  # type: ignore[method-assign]


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """A block in which `torch.compile` gives a function back as it is.

    jit.py decorates functions with it where they are defined, to fuse kernels of a GPU; that alone imports torch's
    compilers, a fifth of what a rank's start costs. The setting of its own, `disable_jit_fuser`, comes too late: whatever
    of `megatron.core` is imported first imports all of it.
    """
    compiler = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def _type_as_on_cuda(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`, whose answer, when nothing is to be converted, names the CUDA type of the same dtype."""

    @functools.wraps(tensor_type)
    def type_as_on_cuda(self: torch.Tensor, dtype: object = None, *args: object, **options: object) -> object:
        answer = tensor_type(self, dtype, *args, **options)
        return answer.replace("torch.", "torch.cuda.", 1) if dtype is None else answer

    return type_as_on_cuda


def _stand_in_for_transformer_engine() -> None:
    """Mend what Megatron-Core 0.16.1 gets wrong where Transformer Engine is missing, with CUDA or without."""
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    # moe_utils.py: the router's product in fp32 (`moe_router_dtype`) asks `te_general_gemm is not None`, but the name
    # exists only where Transformer Engine was imported
    moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def _patch_modules_that_name_cuda() -> None:
    """Give the CPU to the modules that say "cuda" in so many words, and the two helpers that look for CUDA tensors."""
    torch_on_cpu = _TorchOnCpu()
    for name in (
        "megatron.core.optimizer.optimizer",  # the flags and scales an optimizer is made with
        "megatron.core.optimizer.clip_grads",  # the buffers of the gradient norm, every update
        "megatron.core.utils",  # local_multi_tensor_l2_norm, the gradient norm without Apex
        "megatron.core.pipeline_parallel.schedules",  # the token count of every forward-backward pass
        "megatron.core.transformer.moe.moe_utils",  # the tracker of auxiliary losses
    ):
        importlib.import_module(name).torch = torch_on_cpu  # type: ignore[attr-defined]
    # tensor_parallel/random.py: sets the state of CUDA's own generator
    importlib.import_module("megatron.core.tensor_parallel.random")._set_cuda_rng_state = (  # type: ignore[attr-defined]
        lambda state, *args, **options: torch.set_rng_state(state)
    )
    # token_dispatcher.py: all-to-all takes its splits as numpy, but only CUDA tensors are converted
    importlib.import_module("megatron.core.transformer.moe.token_dispatcher").maybe_move_tensor_to_cpu = (  # type: ignore[attr-defined]
        lambda tensor, as_numpy=False, record_stream=False: (
            tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
        )
    )


class _TorchOnCpu:
    """`torch` as one Megatron module sees it: a new tensor for the device "cuda" is made on the CPU."""

    def __init__(self) -> None:
        self.tensor = _factory_on_cpu(torch.tensor)
        self.zeros = _factory_on_cpu(torch.zeros)

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, device: object = None, **options: Any) -> torch.Tensor:
        return factory(*args, device="cpu" if device == "cuda" else device, **options)

    return make


def _transformer_engine_version() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    for distribution in ("transformer_engine", "transformer-engine-torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return "unknown"
