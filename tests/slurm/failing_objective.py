"""GSPO until it is computed: a run that fails at the same step however often it is tried."""

from dataclasses import replace
from typing import NoReturn

from megatron_gspo.policy_loss.base import ObjectiveInputs
from megatron_gspo.policy_loss.gspo import GSPO


def fail(inputs: ObjectiveInputs) -> NoReturn:
    raise RuntimeError("this objective always fails")


OBJECTIVE = replace(GSPO, name="failing", surrogate=fail)
