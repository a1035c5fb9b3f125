import pytest

from megatron_gspo import parallel
from megatron_gspo.config import ParallelSection


@pytest.fixture
def _one_rank() -> None:
    """A world of one, freshly arranged and seeded."""
    parallel.initialize_distributed()
    parallel.initialize_model_parallel(ParallelSection(), seed=1)
