"""One file a row: `measure(bench)` measures it. The table lists them in the order they run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """What a row needs to run."""

    needs_peers: bool = False  # TRL and verl (`install_peers.sh`)
    runs_among_peers: bool = False  # all of it in their environment, because its sides share a process


_BESIDE_PEERS = Row(needs_peers=True, runs_among_peers=True)
ROWS = {
    "policy_loss": _BESIDE_PEERS,
    "log_probs": _BESIDE_PEERS,
    "routing": Row(),
    "packing": Row(),
    "rl_step": Row(needs_peers=True),
    "rollouts": Row(),
    "weights": Row(),
    "checkpoints": Row(),
    "growth": Row(),
    "start_up": Row(),
}
