"""Runs one SGLang server, in SGLang's own Python environment: the only file here that imports SGLang.

    python -P sglang_launcher.py KEY_FILE [flags of sglang.launch_server ...]

In: the file that holds the job's key, SGLang's flags, and on standard input nothing, until the trainer's end closes it.
Out: a server. It is started as a script by path, so it imports nothing of megatron_gspo. Beside `sglang.launch_server` it

- takes the key from a file: `--api-key` on a command line can be read by every user of the machine. SGLang logs all of
  its arguments at its start (srt/entrypoints/engine.py), so the key is taken out of what it logs;
- ends with the trainer, whatever ended that: standard input is then at its end, and the whole process group is killed;
- does not end before it: SIGTERM and SIGUSR1 are the trainer's, which finishes a step and saves, and needs its servers;
- runs on a machine without CUDA (SGLANG_USE_CPU_ENGINE=1), for which SGLang 0.5.21's packages need three adaptations,
  each described where it is made. They stand at module level: whatever SGLang starts by multiprocessing's "spawn" imports
  this file again. The scheduler and detokenizer are forked there instead, so that they need not import SGLang anew, and
  what a start imports is kept to what it needs.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import multiprocessing
import os
import pkgutil
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # what asks a trainer to save and stop
ON_CPU = os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"
MODELS = {"qwen3", "qwen3_moe"}  # modules of sglang.srt.models


def declare_torchvision_operators() -> None:
    """Let `import torchvision` pass beside a CPU build of torch.

    torchvision 0.28's wheel is built for CUDA and its C extension does not load, so that `torchvision/_meta_registrations.py`
    stops at "operator torchvision::nms does not exist". With their schemas declared it goes on; a text model calls neither.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_torchvision_operators"] = library  # they are declared for as long as this object lives


class AbsentKernels(types.ModuleType):
    """Stands for `sgl_kernel`, which is built for CUDA only.

    `srt/layers/` imports names of it at module level also where the CPU engine then runs torch's own operators. A kernel
    that is called all the same says so.
    """

    def __init__(self) -> None:
        super().__init__("sgl_kernel")
        self.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
        self.__path__: list[str] = []
        self.__version__ = "0.0.0"

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: object, **__: object) -> NoReturn:
            raise NotImplementedError(f"sgl_kernel.{name} does not exist without CUDA")

        return absent


class PlainHostBuffers(importlib.abc.MetaPathFinder):
    """Gives `srt/mem_cache/pool_host/common.py` an allocator for "cpu" once that module is imported.

    The buffer behind --enable-return-routed-experts is pinned with cudaHostRegister on every device its table of
    allocators does not name, which fails without CUDA; host memory needs no pinning there.
    """

    MODULE = "sglang.srt.mem_cache.pool_host.common"

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Leave the module to the finders that know it, and add to what its loader makes."""
        del path, target
        if name != self.MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None, f"{name} is part of SGLang 0.5.21"
        execute = spec.loader.exec_module

        def execute_and_add(module: types.ModuleType) -> None:
            execute(module)
            module.ALLOC_MEMORY_FUNCS["cpu"] = _allocate

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def _allocate(
    dims: Any, dtype: Any, device: Any, pin_memory: Any, allocator: Any, registration_granularity_bytes: Any = None
) -> Any:
    del pin_memory, registration_granularity_bytes
    return allocator.allocate(dims, dtype=dtype, device=device)


def adapt_to_cpu() -> None:
    """Make SGLang 0.5.21 importable and usable without CUDA; once a process."""
    if "sgl_kernel" in sys.modules:
        return
    declare_torchvision_operators()
    sys.modules["sgl_kernel"] = AbsentKernels()
    sys.meta_path.insert(0, PlainHostBuffers())


def fork_processes() -> None:
    """Have SGLang fork its scheduler and detokenizer.

    `srt/entrypoints/engine.py` asks for "spawn", which CUDA needs, and with which each imports SGLang again: half of the
    processor time of a start.
    """
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = lambda *_, **__: None


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """A block of imports in which `torch.compile` gives a function back as it is, and garbage is not collected.

    `srt/layers/` decorates kernels of a GPU with it, which imports torch's compilers. What was imported stays to the end.
    """
    import torch

    def as_it_is(model: Any = None, **_: Any) -> Any:  # torch.compile's own name for what it is given
        return as_it_is if model is None else model

    compiler = torch.compile
    torch.compile = as_it_is
    gc.disable()
    yield
    torch.compile = compiler
    gc.freeze()
    gc.enable()


def leave_out_other_models() -> None:
    """Have `srt/models/registry.py` import the models that a trainer here can have, and not all of SGLang's."""
    package = importlib.import_module("sglang.srt.models")
    others = {module.name for module in pkgutil.iter_modules(package.__path__)} - MODELS
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(sorted(others))


def leave_stopping_to_trainer() -> None:
    """Block SIGTERM and SIGUSR1, here and in all that is started from here: SLURM sends them to every process of a job.

    Whoever starts multiprocessing's resource tracker has SIGTERM unblocked afterwards (CPython 3.11,
    `multiprocessing/resource_tracker.py`, `ensure_running`). SGLang's processes would, so it is started before; they
    find it running. SIGUSR1 would end the tracker itself, and is therefore blocked first.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def end_with_trainer() -> None:
    """Kill this process group, schedulers included, once standard input is closed."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(0, signal.SIGKILL)

    assert os.getpgrp() == os.getpid(), "a server has a process group of its own"
    threading.Thread(target=watch, name="trainer's end", daemon=True).start()


def keep_out_of_log(key: str) -> None:
    """Replace the key in whatever is logged from now on."""
    make_record = logging.getLogRecordFactory()

    def without_key(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make_record(*arguments, **named)
        text = record.getMessage()
        if key in text:
            record.msg, record.args = text.replace(key, "(the job's key)"), ()
        return record

    logging.setLogRecordFactory(without_key)


def main(arguments: Sequence[str]) -> None:
    """Serve until the trainer ends."""
    key = Path(arguments[0]).read_text().strip()
    keep_out_of_log(key)

    with nothing_compiled() if ON_CPU else contextlib.nullcontext():
        if ON_CPU:
            leave_out_other_models()
            # `run_server` imports it too, but after this block.
            importlib.import_module("sglang.srt.entrypoints.http_server")
        from sglang.launch_server import run_server
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import prepare_server_args
        from sglang.srt.utils import kill_process_tree

    load_plugins()
    # One word: a random key may begin with a dash, as options do.
    server_args = prepare_server_args([*arguments[1:], f"--api-key={key}"])
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    # Before the imports, which take seconds, and before there are threads, which inherit what is blocked.
    leave_stopping_to_trainer()
    end_with_trainer()

if ON_CPU:
    adapt_to_cpu()

if __name__ == "__main__":
    if ON_CPU:
        fork_processes()
    main(sys.argv[1:])
