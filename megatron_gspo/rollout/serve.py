"""`megatron-gspo serve`: one machine's share of a job's SGLang servers, and how the trainer finds them.

In: a recipe, and a directory that all of the job's machines see and only its owner can enter. `key` lies in it, which
whoever starts the job has made. Out: `rollout.sglang.num_servers` servers on this machine's private address, and, once
all of them answer, their URLs in `servers_MACHINE_of_MACHINES.json`. They serve until the key is gone: the end of a job is
told so, because SLURM's signals to a job reach this process and its servers too while ranks may still finish a step.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_gspo.config import Recipe
from megatron_gspo.launch import Node
from megatron_gspo.rollout.sglang_server import PROGRESS_EVERY_S, SglangServers, model_to_serve, read_key
from megatron_gspo.types import TrainingFailedError, UserError

logger = logging.getLogger(__name__)

KEY_NAME = "key"
LOOK_EVERY_S = 0.5

_SHARE = re.compile(r"servers_(\d+)_of_(\d+)\.json")


def serve(recipe: Recipe, directory: Path, log_dir: Path, node: Node, *, on_cpu: bool) -> None:
    """Run this machine's servers until `directory / KEY_NAME` is gone, or on SIGINT.

    SLURM sends what asks a run to stop to all processes of a job, and this one is to outlive that: `launch.hold_stop_signals`
    is to be called before the process has threads.

    Args:
        recipe: what to serve, and how; its `rollout.sglang.host` where that is not loopback.
        directory: holds the key; shared by the job's machines.
        log_dir: for what servers say; a directory in it is made for this machine.
        node: which of the job's serving machines this is.
        on_cpu: whether servers run without CUDA.

    Raises:
        UserError: the recipe asks for no servers, the key cannot be read, this machine has no private address, or the
            servers do not come up.
        TrainingFailedError: every server here died too often.
    """
    section = recipe.rollout.sglang
    if recipe.rollout.engine != "sglang" or section.urls is not None:
        raise UserError(
            "serve: the recipe asks for no servers; accepted: rollout.engine: sglang without rollout.sglang.urls"
        )
    read_key(directory / KEY_NAME)
    if ipaddress.ip_address(section.host).is_loopback:
        section = section.model_copy(update={"host": private_address()})
    logs = log_dir / f"machine_{node.index}"
    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes begin without
    servers = SglangServers(section, model_to_serve(recipe, on_cpu=on_cpu), logs, key_file=directory / KEY_NAME)
    threading.Thread(target=_interrupt_without_key, args=(directory,), name="end of the job", daemon=True).start()
    try:
        servers.start()
        _announce(directory, node, servers.urls)
        while not servers.are_given_up:
            time.sleep(LOOK_EVERY_S)
    except KeyboardInterrupt:
        logger.info("SGLang servers of machine %d are no longer needed", node.index)
        return
    finally:
        servers.close()
    raise TrainingFailedError(f"every SGLang server of machine {node.index} died too often: {logs}")


def find_servers(directory: Path, timeout_s: float) -> list[str]:
    """URLs of all servers of a job, machine by machine, once every machine's answer.

    Raises:
        UserError: they are not there within `timeout_s`.
    """
    started = told = time.monotonic()
    while (urls := _all_announced(directory)) is None:
        elapsed = time.monotonic() - started
        if elapsed > timeout_s:
            raise UserError(
                f"--servers: {directory} does not name all SGLang servers after rollout.sglang.startup_timeout_s "
                f"({timeout_s:g} s); accepted: a directory that `megatron-gspo serve` serves"
            )
        if time.monotonic() - told > PROGRESS_EVERY_S:
            told = time.monotonic()
            logger.info("waiting for the job's SGLang servers: %.0f s", elapsed)
        time.sleep(LOOK_EVERY_S)
    return urls


def private_address(environment: Mapping[str, str] = os.environ) -> str:
    """The address by which the job's other machines reach this one.

    It is what SLURM's name of this machine, or its own, stands for; else where this machine's words to the job's first
    one come from.

    Raises:
        UserError: none of these is private.
    """
    candidates = list(dict.fromkeys(_addresses(environment)))
    for candidate in candidates:
        address = ipaddress.ip_address(candidate)
        if address.is_private and not (address.is_loopback or address.is_link_local or address.is_unspecified):
            return candidate
    raise UserError(
        f"{socket.gethostname()} is known by {', '.join(candidates) or 'no address'}; accepted: a machine whose name "
        "stands for a private address, or rollout.sglang.host"
    )


def _addresses(environment: Mapping[str, str]) -> Iterator[str]:
    for name in (environment.get("SLURMD_NODENAME"), socket.gethostname()):
        with contextlib.suppress(OSError):
            yield from (str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET) if name)
    if first := environment.get("MASTER_ADDR"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((first, 9))  # sends nothing
            yield str(probe.getsockname()[0])


def _announce(directory: Path, node: Node, urls: list[str]) -> None:
    """Leave the URLs, in a file that is whole or not there."""
    file = directory / f"servers_{node.index}_of_{node.count}.json"
    aside = file.with_suffix(".incomplete")
    aside.write_text(json.dumps(urls))
    aside.rename(file)


def _all_announced(directory: Path) -> list[str] | None:
    shares: dict[int, list[str]] = {}
    for file in directory.glob("servers_*_of_*.json"):
        found = _SHARE.fullmatch(file.name)
        assert found is not None, f"{file} is of this program's"
        shares[int(found[1])] = json.loads(file.read_text())
        if len(shares) == int(found[2]):
            return [url for machine in sorted(shares) for url in shares[machine]]
    return None


def _interrupt_without_key(directory: Path) -> None:
    # Opened, not looked up: on a network's file system only that asks the machine that has the file.
    while True:
        try:
            (directory / KEY_NAME).open("rb").close()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                break
        time.sleep(2 * LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGINT)
