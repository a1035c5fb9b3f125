"""One process that forks the runs of a session's end-to-end tests."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.program import Program


@pytest.fixture(scope="session")
def program() -> Iterator[Program]:
    forked = Program()
    yield forked
    forked.close()
