"""What all sections of a job spec have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema

__all__ = ["AUTO", "AutoInt", "Section", "none_if_auto"]


class Section(BaseModel):
    """A part of a job: nothing unknown is taken, and nothing changes afterwards."""

    # Numbers out of YAML such as "3e-4" (a string in YAML 1.1) are accepted where a number fits.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def none_if_auto(value: Any) -> Any:
    """``auto`` leaves a field open, as if it were not given."""
    return None if value == "auto" else value


AUTO: list[Any] = [{"const": "auto"}, {"type": "null"}]
AutoInt = Annotated[
    int | None,
    BeforeValidator(none_if_auto),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, *AUTO]}),
]
