"""What every section of the recipe is made of: the base class, and the types of its fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _switch(value: object) -> object:
    """`on` and `off` are switches to whoever writes YAML, so they are for a boolean field; text anywhere else."""
    return {"on": True, "off": False}.get(value, value) if isinstance(value, str) else value


Switch = Annotated[bool, BeforeValidator(_switch)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
# A path is written as text, which pydantic's strict mode takes for JSON but not for Python values.
TextPath = Annotated[Path, Field(strict=False)]


class Section(BaseModel):
    """A part of the recipe: unknown fields are refused, values are never coerced from another type, and it is frozen."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
