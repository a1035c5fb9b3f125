"""The recipe: what a run is, typed and checked.

In: a YAML file (`base`, its own fields, `section.field=value` overrides) and the `config.json` of the model it names.
Out: a frozen `Recipe`. Anything that cannot be accepted is one `UserError` naming the place, the field, what was given
and what is accepted.
"""

from megatron_gspo.config.check import check_recipe, recipe_for_world_size, require_data_files
from megatron_gspo.config.load import dump_recipe, load_recipe, read_step_count
from megatron_gspo.config.model_fit import check_recipe_against_model
from megatron_gspo.config.schema import (
    BUILT_IN_TASKS,
    ChainSection,
    DataSection,
    EvaluationSection,
    LoggingSection,
    ModelSection,
    ObjectiveSection,
    ParallelSection,
    Recipe,
    RewardSection,
    RolloutSection,
    RoutingSection,
    TrainingSection,
    WarmstartSection,
)
from megatron_gspo.config.section import Section
from megatron_gspo.config.sglang import SglangSection
from megatron_gspo.config.slurm import SlurmSection

__all__ = [
    "BUILT_IN_TASKS",
    "ChainSection",
    "DataSection",
    "EvaluationSection",
    "LoggingSection",
    "ModelSection",
    "ObjectiveSection",
    "ParallelSection",
    "Recipe",
    "RewardSection",
    "RolloutSection",
    "RoutingSection",
    "Section",
    "SglangSection",
    "SlurmSection",
    "TrainingSection",
    "WarmstartSection",
    "check_recipe",
    "check_recipe_against_model",
    "dump_recipe",
    "load_recipe",
    "read_step_count",
    "recipe_for_world_size",
    "require_data_files",
]
