"""What must hold between a recipe's fields, and between a recipe and where it runs.

What one field alone may hold stands in `schema.py`, what the model asks for in `model_fit.py`. What a recipe means by a
name (an objective, a reward) is for the part that owns the name to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_gspo.config.refusal import Refusal, nearest_name, not_accepted
from megatron_gspo.config.sampling import check_sampling
from megatron_gspo.config.schema import BUILT_IN_TASKS, Recipe
from megatron_gspo.config.sglang import check_sglang
from megatron_gspo.config.slurm import check_slurm
from megatron_gspo.import_path import is_import_path
from megatron_gspo.types import UserError

ACCEPTED_DATA = f"a .jsonl or .parquet file, a built-in task ({', '.join(BUILT_IN_TASKS)}), or package.module:attribute of one's own"


def check_recipe(recipe: Recipe) -> list[Refusal]:
    """What is wrong between the recipe's own fields."""
    checks: tuple[Callable[[Recipe], Iterator[Refusal]], ...] = (
        _check_batches,
        _check_ranks,
        _check_communication,
        _check_objective,
        _check_schedule,
        _check_evaluation,
        _check_data,
        check_sglang,
        check_sampling,
        lambda recipe: check_slurm(recipe.slurm),
    )
    return [refusal for check in checks for refusal in check(recipe)]


def _check_batches(recipe: Recipe) -> Iterator[Refusal]:
    training, replicas = recipe.training, recipe.parallel.data
    prompts = training.prompts_per_step
    if prompts % training.mini_batches:
        yield not_accepted(
            "training.mini_batches",
            training.mini_batches,
            f"a divisor of training.prompts_per_step ({prompts}), so that the mini-batches are equal",
        )
    elif prompts % (training.mini_batches * replicas):
        yield not_accepted(
            "training.prompts_per_step",
            prompts,
            f"a multiple of training.mini_batches ({training.mini_batches}) × parallel.data ({replicas}), so that "
            "every replica has an equal share of every mini-batch",
        )


def _check_ranks(recipe: Recipe) -> Iterator[Refusal]:
    parallel = recipe.parallel
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        yield not_accepted("parallel.virtual_pipeline", parallel.virtual_pipeline, "null while parallel.pipeline is 1")
    if parallel.world_size % parallel.expert_model_size:
        yield not_accepted(
            "parallel.expert",
            parallel.expert,
            f"a size whose product with expert_tensor ({parallel.expert_tensor_size}) and pipeline "
            f"({parallel.pipeline}) divides the {parallel.world_size} ranks of tensor × pipeline × context × data "
            f"({parallel.tensor} × {parallel.pipeline} × {parallel.context} × {parallel.data}), or another parallel.data",
        )


def _check_communication(recipe: Recipe) -> Iterator[Refusal]:
    parallel = recipe.parallel
    if parallel.overlap_parameter_gather and not (parallel.distributed_optimizer and parallel.overlap_gradient_reduce):
        yield not_accepted(
            "parallel.overlap_parameter_gather",
            True,
            "false unless parallel.distributed_optimizer and parallel.overlap_gradient_reduce are true",
        )
    sharing, same_tokens = parallel.expert_tensor_size * parallel.expert, parallel.tensor * parallel.context
    if parallel.dispatcher == "allgather" and same_tokens % sharing:
        # token_dispatcher.py gathers equal parts; other replicas' micro-batches have other lengths.
        yield not_accepted(
            "parallel.dispatcher",
            "allgather",
            f"alltoall where ranks of several replicas share the experts: expert_tensor × expert ({sharing}) does not "
            f"divide tensor × context ({same_tokens})",
        )


def _check_objective(recipe: Recipe) -> Iterator[Refusal]:
    objective = recipe.objective
    if objective.constant_length is not None and objective.aggregation != "constant_length":
        yield not_accepted(
            "objective.constant_length",
            objective.constant_length,
            f"null under objective.aggregation: {objective.aggregation}; only constant_length divides by it",
        )
    if objective.truncated_importance_cap is not None and recipe.rollout.old_log_probs == "engine":
        yield not_accepted(
            "objective.truncated_importance_cap",
            objective.truncated_importance_cap,
            "null under rollout.old_log_probs: engine, where the clipped ratio is taken against the engine's own log-probs "
            "and there are no others to weigh them by; rollout.old_log_probs: trainer recomputes those",
        )
    if recipe.routing.replay == "r2" and recipe.rollout.old_log_probs == "engine":
        yield not_accepted(
            "routing.replay",
            "r2",
            "off or r3 under rollout.old_log_probs: engine; r2 replays the routes of the old-policy pass, which is "
            "made under rollout.old_log_probs: trainer only",
        )


def _check_schedule(recipe: Recipe) -> Iterator[Refusal]:
    training = recipe.training
    if training.min_learning_rate > training.learning_rate:
        yield not_accepted(
            "training.min_learning_rate",
            training.min_learning_rate,
            f"at most training.learning_rate ({training.learning_rate})",
        )
    if training.learning_rate_schedule == "constant":
        return
    updates = training.steps * training.mini_batches
    if training.warmup_updates >= updates:
        yield not_accepted(
            "training.warmup_updates",
            training.warmup_updates,
            f"fewer than the run's {updates} updates (training.steps × training.mini_batches), so that the "
            f"{training.learning_rate_schedule} schedule has some left to decay over",
        )


def _check_evaluation(recipe: Recipe) -> Iterator[Refusal]:
    evaluation = recipe.evaluation
    if evaluation.temperature == 0 and evaluation.samples_per_prompt > 1:
        yield not_accepted(
            "evaluation.samples_per_prompt",
            evaluation.samples_per_prompt,
            "1 under evaluation.temperature: 0, where every sample is the same",
        )


def _check_data(recipe: Recipe) -> Iterator[Refusal]:
    chain = recipe.data.arithmetic_chain
    for field, given in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if given is not None and not names_a_task(given) and not names_a_file(given):
            yield not_accepted(field, given, f"{ACCEPTED_DATA}{nearest_name(given, BUILT_IN_TASKS)}")
    if chain.min_operations > chain.max_operations:
        yield not_accepted(
            "data.arithmetic_chain.min_operations",
            chain.min_operations,
            f"at most data.arithmetic_chain.max_operations ({chain.max_operations})",
        )


def names_a_task(text: str) -> bool:
    """Whether a data field names a task, built in or of one's own, and not a file."""
    return text in BUILT_IN_TASKS or is_import_path(text)


def names_a_file(text: str) -> bool:
    """Whether a data field's text looks like a path: it has a directory or a suffix. Else it is a name."""
    return text != Path(text).name or bool(Path(text).suffix)


def require_data_files(recipe: Recipe) -> None:
    """Refuse data files that are not there. Apart from loading, so that a recipe can be read where its data is not."""
    for field, given in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        if given is not None and not names_a_task(given) and not Path(given).is_file():
            raise UserError(f"{field} is {given}, which is not a file; accepted: {ACCEPTED_DATA}")


def recipe_for_world_size(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with as many data-parallel replicas as `world_size` ranks hold, for a trainer that joins a launcher.

    Raises:
        UserError: the ranks, or a step's prompts, cannot be divided so.
    """
    parallel = recipe.parallel
    if world_size % parallel.model_size:
        raise UserError(
            f"the launcher started {world_size} ranks; accepted: a multiple of parallel.tensor × pipeline × context "
            f"({parallel.tensor} × {parallel.pipeline} × {parallel.context})"
        )
    parallel = parallel.model_copy(update={"data": world_size // parallel.model_size})
    resized = recipe.model_copy(update={"parallel": parallel})
    refusals = check_recipe(resized)
    if refusals:
        raise UserError(
            "\n".join(f"with the {world_size} ranks that the launcher started, {refusal}" for refusal in refusals)
        )
    return resized
