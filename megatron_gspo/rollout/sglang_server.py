"""Starts SGLang servers on this machine, watches over them, and ends them.

In: the recipe's `rollout.sglang`, and what the model and the run ask for. Out: the URLs of servers that answer, and the
key they take. Servers listen on loopback or the machine's private address and take a random key of the job, which lies in
a file only its owner can read; it is on no command line and in no log (`sglang_launcher`). Threads watch them: a server that
answers nothing any more is ended, and one that has ended is started again. It then holds no weights of this run, and the
client gives it the current ones before it is asked for anything. Servers end with this process, whatever ends it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import signal
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from megatron_gspo.config import Recipe, SglangSection
from megatron_gspo.launch import free_port
from megatron_gspo.rollout.sglang_http import LOOK_TIMEOUT_S
from megatron_gspo.rollout.sglang_response import SUPPORTED_VERSION
from megatron_gspo.types import UserError

logger = logging.getLogger(__name__)

LAUNCHER = Path(__file__).parent / "sglang_launcher.py"
PYTHON_VARIABLE = "MEGATRON_GSPO_SGLANG_PYTHON"
INSTALLED_PYTHON = Path(__file__).parents[2] / ".venv-sglang" / "bin" / "python"
CPU_CACHE_TOKENS = 65_536
LAST_LINES = 15
PROGRESS_EVERY_S = 10.0
RESTART_PAUSE_S = 2.0
#: Each server is asked for a sign of life this often, or eight times in `hang_timeout_s` where that is more often.
LOOK_EVERY_S = 10.0
MAX_RESTARTS = 5

#: What launchers of ranks say to their ranks, and what would put the trainer's own packages into a server's way.
NOT_FOR_SERVERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")


@dataclass(frozen=True)
class ServerModel:
    """What servers serve."""

    path: Path  # a Hugging Face directory; only its config.json is read
    dtype: str
    on_cpu: bool
    return_routed_experts: bool


def model_to_serve(recipe: Recipe, *, on_cpu: bool) -> ServerModel:
    """What the servers of a recipe's run serve."""
    return ServerModel(
        path=recipe.model.path,
        dtype=recipe.model.dtype,
        on_cpu=on_cpu,
        return_routed_experts=recipe.routing.replay == "r3",
    )


def find_python(section: SglangSection) -> Path:
    """The Python that SGLang is installed for.

    Raises:
        UserError: it is not there.
    """
    given = section.python or os.environ.get(PYTHON_VARIABLE)
    python = Path(given) if given else INSTALLED_PYTHON
    if not os.access(python, os.X_OK):
        named = "rollout.sglang.python" if section.python else f"${PYTHON_VARIABLE}" if given else "SGLang's Python"
        raise UserError(
            f"{named} is {python}, which cannot be run; accepted: the Python of an environment with SGLang "
            f"{SUPPORTED_VERSION} (`bash tools/install_sglang_cpu.sh` makes one without CUDA)"
        )
    return python


def launch_command(
    python: Path, key_file: Path, section: SglangSection, model: ServerModel, index: int, port: int
) -> list[str]:
    """The command line of server `index`: nothing secret, and one address to listen on."""
    flags = {
        "--model-path": str(model.path),
        "--load-format": "dummy",  # the weights come with the first hand-over
        "--host": section.host,
        "--port": str(port),
        "--dtype": section.dtype or model.dtype,
        "--tp-size": str(section.tensor_parallel),
        "--mem-fraction-static": str(section.memory_fraction),
        "--max-running-requests": str(section.max_requests_in_flight),
        "--device": "cpu" if model.on_cpu else "cuda",
    }
    if model.on_cpu:
        flags["--attention-backend"] = "torch_native"
    else:
        flags["--base-gpu-id"] = str(section.first_gpu + index * section.tensor_parallel)
    if section.max_total_tokens is not None or model.on_cpu:
        flags["--max-total-tokens"] = str(section.max_total_tokens or CPU_CACHE_TOKENS)
    switches = ["--skip-tokenizer-init"] + ["--enable-return-routed-experts"] * model.return_routed_experts
    # An idle scheduler asks for work without a pause (srt/managers/scheduler.py): a core that the trainer needs here.
    switches += ["--sleep-on-idle"] * model.on_cpu
    # On the CPU there is no memory saver, and nothing it could save.
    switches += ["--enable-memory-saver"] * (section.release_memory and not model.on_cpu)
    named = [part for name, value in flags.items() for part in (name, value)]
    # -P keeps the launcher's own directory, and with it this package's module names, out of the server's imports.
    return [str(python), "-P", str(LAUNCHER), str(key_file), *named, *switches, *(section.extra_flags or "").split()]


def server_environment(on_cpu: bool, host: str = "127.0.0.1") -> dict[str, str]:
    """The environment of a server that listens on `host`: this process's, without what belongs to a rank."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_FOR_SERVERS and not name.startswith(("TORCHELASTIC_", "SGLANG_"))
    }
    if ipaddress.ip_address(host).is_loopback:
        kept |= {"GLOO_SOCKET_IFNAME": "lo"}  # else gloo listens on the address of the machine's name
    return kept | ({"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})


def write_key(directory: Path) -> Path:
    """A new random key in a file that only its owner can read."""
    file = directory / "key"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(secrets.token_urlsafe(32))
    return file


def read_key(file: Path) -> str:
    """The key in `file`.

    Raises:
        UserError: it cannot be read, is empty, or others than its owner can read it.
    """
    try:
        mode, key = file.stat().st_mode, file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"rollout.sglang.key_file: {file} cannot be read ({error})") from error
    if mode & 0o077:
        raise UserError(
            f"rollout.sglang.key_file: {file} has mode {mode & 0o777:o}, so others can read the key; accepted: 600"
        )
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"rollout.sglang.key_file: {file} holds no key; accepted: one line of printable ASCII")
    return key


@dataclass
class _Server:
    """One server's process and where it is reached."""

    index: int
    port: int
    url: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    is_up: bool = False  # it has answered since it was launched
    given_up: bool = False


@dataclass
class SglangServers:
    """The servers of one run on this machine. `directory` holds their logs, and the key where none is given."""

    section: SglangSection
    model: ServerModel
    directory: Path
    restarts: int = 0  # since the servers came up
    key_file: Path | None = None  # of mode 0600; None has a new key made in `directory`
    _servers: list[_Server] = field(default_factory=list)
    _closing: threading.Event = field(default_factory=threading.Event)
    _watcher: threading.Thread | None = None

    def start(self) -> None:
        """Start all servers, and return when each answers.

        Raises:
            UserError: SGLang is not installed, a server does not come up (with its own last lines), or not in time.
        """
        self._python = find_python(self.section)
        if self.key_file is None:
            self.key_file = write_key(self.directory)
        self.key = read_key(self.key_file)
        for index in range(self.section.num_servers):
            port = _free_port(self.section.host) if self.section.first_port is None else self.section.first_port + index
            host = f"[{self.section.host}]" if ":" in self.section.host else self.section.host
            server = _Server(index, port, f"http://{host}:{port}", self.directory / f"server_{index}.log")
            self._servers.append(server)
            self._launch(server)
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise
        self._watcher = threading.Thread(target=self._watch, name="sglang servers", daemon=True)
        self._watcher.start()
        for server in self._servers:
            threading.Thread(target=self._listen_to, args=(server,), name="sglang server", daemon=True).start()

    @property
    def urls(self) -> list[str]:
        """Where the servers are reached."""
        return [server.url for server in self._servers]

    @property
    def are_given_up(self) -> bool:
        """Whether every server has died too often to be started again."""
        return all(server.given_up for server in self._servers)

    def process_ids(self) -> list[int]:
        """The servers' processes that run; each leads a process group."""
        return [server.process.pid for server in self._servers if server.process and server.process.poll() is None]

    def restart(self, url: str) -> None:
        """End a server that answers no more; it is started again as one that died."""
        for server in self._servers:
            if server.url == url:
                self._end_silent(server)

    def take_restarts(self) -> int:
        """Restarts since this was last asked."""
        taken, self.restarts = self.restarts, 0
        return taken

    def close(self) -> None:
        """End all servers. Closing twice is allowed."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        for server in self._servers:
            _end(server)

    def _end_silent(self, server: _Server) -> None:
        if server.process is not None and server.process.poll() is None:
            logger.warning("SGLang server %d is silent and is ended", server.index)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)

    def _launch(self, server: _Server) -> None:
        assert self.key_file is not None, "start has seen to it"
        command = launch_command(self._python, self.key_file, self.section, self.model, server.index, server.port)
        with server.log.open("ab") as log:
            server.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # held open by this process alone: the server ends when it does
                stdout=log,
                stderr=subprocess.STDOUT,
                env=server_environment(self.model.on_cpu, self.section.host),
                start_new_session=True,
            )
        server.is_up = False

    def _wait_until_up(self) -> None:
        started = told = time.monotonic()
        while waiting := [server for server in self._servers if not server.is_up]:
            for server in waiting:
                assert server.process is not None, "it was launched"
                if (status := server.process.poll()) is not None:
                    raise UserError(
                        f"SGLang server {server.index} ended with status {status} instead of coming up; its last lines "
                        f"were\n{_last_lines(server.log)}"
                    )
                server.is_up = _answers(server.url)
            elapsed = time.monotonic() - started
            if elapsed > self.section.startup_timeout_s:
                raise UserError(
                    f"SGLang server {waiting[0].index} did not come up within rollout.sglang.startup_timeout_s "
                    f"({self.section.startup_timeout_s:g} s); its last lines were\n{_last_lines(waiting[0].log)}"
                )
            if time.monotonic() - told > PROGRESS_EVERY_S:
                told = time.monotonic()
                up = len(self._servers) - len(waiting)
                logger.info("waiting for SGLang: %d of %d servers up after %.0f s", up, len(self._servers), elapsed)
            time.sleep(0.5)
        logger.info("SGLang: %d servers up after %.0f s", len(self._servers), time.monotonic() - started)

    def _listen_to(self, server: _Server) -> None:
        """End a server that answers nothing any more.

        It is asked for what its scheduler says of itself, so one whose scheduler hangs is silent too. (`/health` would have
        it sample a token, which wakes a server at rest and ends one whose memory is released.) Silence is summed up over
        questions: time in which this process was suspended, and its servers with it, is not theirs.
        """
        asked, silent_s = server.process, 0.0
        pause_s = self._pause_s()
        while not self._closing.wait(pause_s):
            asked_at = time.monotonic()
            answers = _tells_of_itself(server.url, self.key, timeout_s=min(LOOK_TIMEOUT_S, 3 * pause_s))
            if server.process is not asked:
                asked, silent_s = server.process, 0.0
            elif answers:
                server.is_up, silent_s = True, 0.0
            else:
                silent_s += pause_s + min(time.monotonic() - asked_at, LOOK_TIMEOUT_S)
                limit_s = self.section.hang_timeout_s if server.is_up else self.section.startup_timeout_s
                if silent_s > limit_s:
                    self._end_silent(server)
            pause_s = self._pause_s()

    def _pause_s(self) -> float:
        return min(LOOK_EVERY_S, self.section.hang_timeout_s / 8)

    def _watch(self) -> None:
        """Start again what dies. A server that keeps dying is given up; the client says so when none is left."""
        while not self._closing.wait(RESTART_PAUSE_S):
            for server in self._servers:
                if server.given_up or server.process is None or server.process.poll() is None:
                    continue
                status, lines = server.process.returncode, _last_lines(server.log)
                _end(server)
                if server.restarts >= MAX_RESTARTS:
                    server.given_up = True
                    logger.error("SGLang server %d died %d times and is given up", server.index, MAX_RESTARTS + 1)
                    continue
                logger.warning(
                    "SGLang server %d ended with status %s and is started again; its last lines were\n%s",
                    server.index,
                    status,
                    lines,
                )
                server.restarts += 1
                self.restarts += 1
                self._launch(server)


def _end(server: _Server) -> None:
    """Kill a server with all of its processes."""
    if server.process is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    if server.process.stdin is not None:
        server.process.stdin.close()


def _answers(url: str) -> bool:
    """Whether a server is up: SGLang answers 503 until its warm-up request is done. Needs no key."""
    try:
        return httpx.get(f"{url}/health", timeout=30.0, trust_env=False).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _tells_of_itself(url: str, key: str, timeout_s: float) -> bool:
    """Whether a server and its scheduler answer in time."""
    headers = {"Authorization": f"Bearer {key}"}
    try:
        answer = httpx.get(f"{url}/server_info", headers=headers, timeout=timeout_s, trust_env=False)
    except httpx.TransportError:
        return False
    return answer.status_code == httpx.codes.OK


def _last_lines(log: Path) -> str:
    with log.open(errors="replace") as lines:
        return "".join(f"  {line.rstrip()}\n" for line in deque(lines, maxlen=LAST_LINES)).rstrip("\n")


def _free_port(host: str) -> int:
    try:
        return free_port(host)
    except OSError as error:
        raise UserError(f"rollout.sglang.host is {host}, which this machine cannot listen on ({error})") from error
