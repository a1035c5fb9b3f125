"""Builds the rollout engine that a recipe names.

In: the recipe, on every rank. Out: on data leaders a `Rollouts`, whose engine gets its weights with the first hand-over.
Of SGLang servers the first rank is the owner: it starts them, or takes those that run, and tells the others how to reach
them through the ranks' own process group.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from megatron_gspo import parallel
from megatron_gspo.config import Recipe
from megatron_gspo.platform import device
from megatron_gspo.reward import RewardScorer
from megatron_gspo.rollout.engine import RolloutEngine
from megatron_gspo.rollout.environments import EnvironmentFactory, find_environment
from megatron_gspo.rollout.local import LocalEngine
from megatron_gspo.rollout.multi_turn import MultiTurn, require_stop_tokens
from megatron_gspo.training.agreement import on_main_rank, together
from megatron_gspo.training.rollouts import Rollouts
from megatron_gspo.training.stopping import is_stop_requested


def open_rollouts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, servers: Path | None = None) -> Rollouts | None:
    """The engine and reward that the recipe names, on data leaders. Every rank calls this.

    `servers` is the directory of a job's SGLang servers (`rollout.serve`); None has them started, or named by the recipe.

    Raises:
        UserError: there is no such reward or environment, or the engine cannot be built; on every rank.
    """
    is_leader = parallel.is_data_leader()
    make_environment = together(lambda: _environment(recipe, tokenizer))
    scorer = together(lambda: RewardScorer(recipe.reward.name, recipe.reward.timeout_s) if is_leader else None)
    if recipe.rollout.engine == "sglang":
        engine = _sglang_engine(recipe, servers)
    else:
        engine = together(lambda: _local_engine(recipe))
    if engine is None:
        return None
    assert scorer is not None, "data leaders have a reward and an engine"
    multi_turn = None
    if make_environment is not None:
        environment = recipe.environment
        multi_turn = MultiTurn(
            engine,
            make_environment,
            tokenizer,
            max_turns=environment.max_turns,
            max_observation_tokens=environment.max_observation_tokens,
        )
    return Rollouts(engine, scorer, tokenizer, multi_turn)


def _environment(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> EnvironmentFactory | None:
    if recipe.environment.name is None:
        return None
    factory = find_environment(recipe.environment.name)
    require_stop_tokens(factory, tokenizer)
    return factory


def _local_engine(recipe: Recipe) -> RolloutEngine | None:
    if not parallel.is_data_leader():
        return None
    return LocalEngine(
        recipe.model.path,
        dtype=getattr(torch, recipe.rollout.dtype or recipe.model.dtype),
        device=device(),
        max_concurrent_responses=recipe.rollout.max_concurrent_responses,
        return_routed_experts=recipe.routing.replay == "r3",
    )


def _sglang_engine(recipe: Recipe, servers: Path | None) -> RolloutEngine | None:
    # Imported here: a run of the local engine does not need httpx, or to know of servers.
    from megatron_gspo.rollout.sglang import ServerConnection, ServerHost, SglangEngine

    host: ServerHost | None = None

    def start() -> ServerConnection:
        nonlocal host
        host = ServerHost(recipe, on_cpu=device().type == "cpu", servers=servers)
        return host.connection

    connection = on_main_rank(start)
    is_leader, num_clients = parallel.is_data_leader(), parallel.data_size()
    try:
        return together(
            lambda: (
                SglangEngine(
                    recipe, connection, host=host, num_clients=num_clients, is_stop_requested=is_stop_requested
                )
                if is_leader
                else None
            )
        )
    except BaseException:
        if host is not None:
            host.close()
        raise
