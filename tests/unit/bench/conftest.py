import pytest

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection


@pytest.fixture(autouse=True, scope="module")
def _one_rank() -> None:
    """A world of one, arranged and seeded."""
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(ParallelSection(), seed=1)
