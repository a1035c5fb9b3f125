"""From an objective's name, or the import path of one's own, to the objective."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from megatron_gspo.names import nearest_name, refuse_unknown_name
from megatron_gspo.policy_loss.base import Objective
from megatron_gspo.policy_loss.grpo import GRPO
from megatron_gspo.policy_loss.gspo import GSPO
from megatron_gspo.policy_loss.gspo_token import GSPO_TOKEN
from megatron_gspo.types import UserError

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {objective.name: objective for objective in (GSPO, GSPO_TOKEN, GRPO)}
)


def resolve_objective(name: str) -> Objective:
    """Find an objective by its name in `OBJECTIVES`, or import it from `package.module:attribute`.

    Raises:
        UserError: the name is unknown, or nothing that is an `Objective` is at the import path.
    """
    if ":" in name:
        return _import_objective(name)
    refuse_unknown_name(
        "objective.name", name, OBJECTIVES, also=", or package.module:attribute of an Objective of one's own"
    )
    return OBJECTIVES[name]


def _import_objective(path: str) -> Objective:
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise UserError(f"objective.name is {path!r}; an import path is written package.module:attribute.")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only the module that was named is the recipe's mistake; one that it fails to import is its author's.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"objective.name is {path!r}, but there is no module {error.name!r} to import.") from error
    if not hasattr(module, attribute):
        objectives = [name for name, value in vars(module).items() if isinstance(value, Objective)]
        raise UserError(
            f"objective.name is {path!r}{nearest_name(attribute, objectives)}; "
            f"objectives in {module_name}: {', '.join(sorted(objectives)) or 'none'}."
        )
    objective = getattr(module, attribute)
    if not isinstance(objective, Objective):
        raise UserError(f"objective.name is {path!r}, which is a {type(objective).__name__} and not an Objective.")
    return objective
