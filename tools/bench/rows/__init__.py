"""One file a row: `measure(bench)` measures it. The table says which, in the order they run, and whether a row needs the
environment of the peers (`install_peers.sh`) because its sides live in one process."""

ROWS = {
    "policy_loss": True,
    "log_probs": True,
    "routing": False,
    "packing": False,
    "start_up": False,
}
