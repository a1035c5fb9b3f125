"""Skipped updates: counted, and the end of the run when they come in a row."""

import pytest

from megatron_gspo.training.guards import BAD_GRADIENT, SkippedUpdates, TrainingDivergedError


def test_the_run_ends_when_more_updates_in_a_row_are_skipped_than_allowed():
    skipped = SkippedUpdates(allowed_in_a_row=2)
    skipped.skipped(1, "a log-prob of response 7 is nan")
    skipped.skipped(1, BAD_GRADIENT)
    with pytest.raises(TrainingDivergedError, match=r"3 updates in a row.*a gradient is not finite.*learning_rate"):
        skipped.skipped(2, BAD_GRADIENT)


def test_an_update_that_is_made_starts_the_count_again():
    skipped = SkippedUpdates(allowed_in_a_row=1)
    for step in range(5):
        skipped.skipped(step, BAD_GRADIENT)
        skipped.made()
    assert skipped.total == 5
    assert skipped.in_a_row == 0
