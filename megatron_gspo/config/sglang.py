"""What must hold in `rollout.sglang`: where servers may listen, what is asked of running ones, which flags are passed on."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from urllib.parse import urlsplit

from megatron_gspo.config.refusal import Refusal, nearest_name, not_accepted
from megatron_gspo.config.schema import Recipe, SglangSection

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
    section = recipe.rollout.sglang
    yield from _check_running_servers(section)
    yield from _check_address(section)
    for flag in (section.extra_flags or "").split():
        name = flag.partition("=")[0]
        if name not in EXTRA_FLAGS:
            accepted = f"--flag=value or --flag of SGLang's {', '.join(EXTRA_FLAGS)}{nearest_name(name, EXTRA_FLAGS)}"
            yield Refusal("rollout.sglang.extra_flags", f"has {name}; accepted: {accepted}")


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
        elif section.weights_dir is None and not _is_loopback(parts.hostname):
            yield Refusal(
                "rollout.sglang.weights_dir",
                f"is null, and {url} is on another machine; accepted: a directory that both machines see under one path",
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
