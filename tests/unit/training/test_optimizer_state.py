"""A rank alone gives its optimizer states as they are, and Megatron makes the same of them as of gathered ones."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_gspo.config import load_recipe
from megatron_gspo.training import checkpoint
from megatron_gspo.training.assembly import build_models, reinforcement_learning_rate
from megatron_gspo.training.optimizer import build_trainable_policy
from tests.tiny_model import tiny_recipe, write_tiny_model


def optimizer_tensors(sharded: dict[str, Any]) -> list[ShardedTensor | ShardedTensorFactory]:
    """In the order of the parameters; parameters of different layers or experts share a key."""
    return [
        value
        for value in nested_values(sharded["optimizer"])
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
    ]


@pytest.mark.usefixtures("_one_rank")
def test_states_of_a_rank_alone_are_megatrons_own_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tiny_model(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(tiny_recipe(tmp_path / "model"))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    policy = build_trainable_policy(build_models(recipe), recipe, reinforcement_learning_rate(recipe))
    as_they_are = optimizer_tensors(checkpoint.sharded_state(policy, is_loading=False))
    states = [state for each in policy.optimizer.chained_optimizers for state in each.optimizer.state.values()]
    for state in states:
        state["exp_avg"].uniform_()
        state["exp_avg_sq"].uniform_()
    monkeypatch.setattr(checkpoint, "without_gathering", lambda optimizers: nullcontext())
    gathered = optimizer_tensors(checkpoint.sharded_state(policy, is_loading=False))
    assert len(as_they_are) == len(gathered) == 3 * len(states)
    for ours, megatrons in zip(as_they_are, gathered, strict=True):
        assert ours.key == megatrons.key
        # Live: they show the moments drawn after the call.
        assert torch.equal(ours.data, megatrons.data), ours.key
        assert ours.replica_id == megatrons.replica_id
    live = {moment.data_ptr() for state in states for moment in (state["exp_avg"], state["exp_avg_sq"])}
    assert live <= {tensor.data.data_ptr() for tensor in as_they_are}
