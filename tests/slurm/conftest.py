"""One cluster for the session."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not

ROOT = Path("/var/tmp/megatron_gspo_test_cluster")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes with 16 CPUs and 8 GPUs each, as SLURM sees it. Skips where there can be none."""
    if reason := why_not():
        pytest.skip(f"SLURM {reason}")
    # Names of networks are the machine's: another session's cluster goes first.
    with ROOT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = dict(os.environ)
        cluster = Cluster(ROOT)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
            os.environ.clear()
            os.environ.update(environment)
