"""The recipe's `rollout.sglang`: SGLang servers, and what must hold of them.

Where servers may listen, what is asked of running ones, which flags are passed on.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field

from megatron_gspo.config.refusal import Refusal, nearest_name, not_accepted
from megatron_gspo.config.section import NonNegative, Positive, PositiveFloat, Section, TextPath

if TYPE_CHECKING:
    from megatron_gspo.config.schema import Recipe


class SglangSection(Section):
    """SGLang servers, for `rollout.engine: sglang`: started by the trainer's first rank, or running already (`urls`)."""

    urls: str | None = None
    """Servers that run already, separated by commas: http://10.0.0.5:30000,http://10.0.0.6:30000. Null starts servers."""
    key_file: TextPath | None = None
    """File (mode 0600) with the key of the servers in `urls`. Servers started here get a random key of their own."""
    num_servers: Positive = 1
    """Servers to start."""
    tensor_parallel: Positive = 1
    """GPUs a server's model is spread over."""
    first_gpu: NonNegative = 0
    """Where servers' GPUs begin on their machine: server i takes `tensor_parallel` from first_gpu + i × tensor_parallel."""
    host: str = "127.0.0.1"
    """Address to listen on: loopback, or the machine's private address where ranks run on other machines."""
    first_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Server i listens on first_port + i; null takes free ports."""
    python: TextPath | None = None
    """The Python that has SGLang. Null takes $MEGATRON_GSPO_SGLANG_PYTHON, else `.venv-sglang` beside this package."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """What servers compute in; null takes `model.dtype`."""
    memory_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    """Share of the memory for weights and key-value cache together (SGLang's --mem-fraction-static)."""
    max_total_tokens: Positive | None = None
    """Tokens the key-value cache holds; null takes what memory leaves on a GPU, and 65,536 on the CPU."""
    extra_flags: str | None = None
    """Further flags of SGLang, separated by spaces; accepted are those of `EXTRA_FLAGS` below."""
    max_requests_in_flight: Positive = 128
    """Responses a server samples at one time, of all ranks together; more wait in the trainer."""
    weight_transport: Literal["disk", "broadcast"] = "disk"
    """How weights reach servers: `disk`, files that they load; `broadcast`, process groups with them (NCCL, gloo on the CPU)."""
    weights_dir: TextPath | None = None
    """Where `disk` writes weights for servers to load; null takes a temporary directory of this machine."""
    weight_bucket_bytes: Positive = 512 * 1024**2
    """Bytes that `broadcast` sends at one time; a single larger weight goes by itself."""
    weight_timeout_s: PositiveFloat = 300.0
    """How long a server may take over one bucket of `broadcast`, or to join its group, before it is out of use."""
    release_memory: bool = False
    """Have servers give back the memory of weights and key-value cache during the update; for servers on the trainer's GPUs."""
    startup_timeout_s: PositiveFloat = 900.0
    """How long servers may take to come up."""
    request_timeout_s: PositiveFloat = 1800.0
    """How long a server may be silent over a response before it is asked of another one; above the longest sampling."""
    hang_timeout_s: PositiveFloat = 600.0
    """How long a server started here may answer nothing at all before it is ended and started again; above the longest
    loading of weights."""
    outage_timeout_s: PositiveFloat = 900.0
    """How long a step waits while no server answers."""

    def server_urls(self) -> list[str]:
        """`urls`, one by one, without a slash at the end; empty where servers are started."""
        return [url.strip().rstrip("/") for url in (self.urls or "").split(",") if url.strip()]


#: Flags of SGLang 0.5.21 that a recipe may add. They tune speed and memory. None opens a port, loads code or adapters,
#: changes what is sampled, or is set by this project itself.
EXTRA_FLAGS = (
    "--attention-backend",
    "--chunked-prefill-size",
    "--context-length",
    "--cuda-graph-max-bs",
    "--disable-cuda-graph",
    "--disable-overlap-schedule",
    "--disable-radix-cache",
    "--ep-size",
    "--kv-cache-dtype",
    "--max-prefill-tokens",
    "--moe-runner-backend",
    "--page-size",
    "--schedule-conservativeness",
    "--schedule-policy",
    "--watchdog-timeout",
)


def check_sglang(recipe: Recipe) -> Iterator[Refusal]:
    """What is wrong in the recipe's `rollout.sglang`, and with fields that only this engine has."""
    if recipe.rollout.engine != "sglang":
        if recipe.rollout.verify_weights:
            yield not_accepted(
                "rollout.verify_weights", True, "false under rollout.engine: local, which shares no server"
            )
        return
    if recipe.rollout.dtype is not None:
        yield not_accepted(
            "rollout.dtype",
            recipe.rollout.dtype,
            "null under rollout.engine: sglang, whose servers compute in rollout.sglang.dtype",
        )
    section = recipe.rollout.sglang
    yield from _check_weights(section)
    yield from _check_running_servers(section)
    yield from _check_address(section)
    for flag in (section.extra_flags or "").split():
        name = flag.partition("=")[0]
        if name not in EXTRA_FLAGS:
            accepted = f"--flag=value or --flag of SGLang's {', '.join(EXTRA_FLAGS)}{nearest_name(name, EXTRA_FLAGS)}"
            yield Refusal("rollout.sglang.extra_flags", f"has {name}; accepted: {accepted}")


def _check_weights(section: SglangSection) -> Iterator[Refusal]:
    if section.weight_transport == "broadcast" and section.weights_dir is not None:
        yield not_accepted(
            "rollout.sglang.weights_dir",
            str(section.weights_dir),
            "null under rollout.sglang.weight_transport: broadcast, which writes no files",
        )


def _check_running_servers(section: SglangSection) -> Iterator[Refusal]:
    urls = section.server_urls()
    if section.urls is None:
        if section.key_file is not None:
            yield not_accepted(
                "rollout.sglang.key_file",
                str(section.key_file),
                "null while rollout.sglang.urls is null: servers started by the trainer have a random key of their own",
            )
        return
    if not urls:
        yield not_accepted("rollout.sglang.urls", section.urls, "http://HOST:PORT, or several separated by commas")
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.path or parts.query:
            yield not_accepted("rollout.sglang.urls", url, "http://HOST:PORT, or several separated by commas")
        elif section.weight_transport == "disk" and section.weights_dir is None and not _is_loopback(parts.hostname):
            yield Refusal(
                "rollout.sglang.weights_dir",
                f"is null, and {url} is on another machine; accepted: a directory that both machines see under one path, "
                "or rollout.sglang.weight_transport: broadcast",
            )
    if section.key_file is None:
        yield not_accepted("rollout.sglang.key_file", None, "a file (mode 0600) with the key of rollout.sglang.urls")


def _check_address(section: SglangSection) -> Iterator[Refusal]:
    accepted = "127.0.0.1, or a private address of this machine"
    try:
        address = ipaddress.ip_address(section.host)
    except ValueError:
        yield not_accepted("rollout.sglang.host", section.host, accepted)
        return
    # `is_private` holds for 0.0.0.0 too, which is every address of the machine.
    if not address.is_private or address.is_unspecified:
        yield not_accepted("rollout.sglang.host", section.host, accepted)


def _is_loopback(hostname: str) -> bool:
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return hostname == "localhost"
