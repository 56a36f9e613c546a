"""Strict, typed models of what a user writes: every mistake is a `ConfigError`.

It names the key's path, what was found and what to write instead.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]  # ranks exchange counts in 64 bits
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says what was wrong, what was found and what to write."""


class StrictModel(BaseModel):
    """Unknown keys and wrong types are errors, and a checked value does not change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], raw: Any, *, where: str, prefix: str = "") -> Model:
    """Check raw against a model; every mistake of it is in one ConfigError, a line each."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        found = _explain(model, error)
        lines = [f"{where}: {(prefix + line).replace('.: ', ': ', 1)}" for line in found]  # ".: " where it is no block
        raise ConfigError("\n".join(lines)) from None


def _explain(model: type[BaseModel], error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key{_nearest(model, item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"{path}: this key is missing; write it")
        elif item["type"] == "model_type":
            lines.append(f"{path}: found {item['input']!r}; this is a block of keys, so write a mapping")
        elif item["type"] == "value_error":
            lines.append(f"{path + ': ' if path else ''}{item['ctx']['error']}")
        else:
            lines.append(f"{path}: found {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}")
    return lines


def _nearest(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    block: Any = model
    for part in loc[:-1]:
        block = submodel(block, str(part))
        if block is None:
            return ""
    names = list(block.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; the keys here are {', '.join(names)}"


def submodel(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a block inside another, None for a plain key."""
    field = model.model_fields.get(name)
    if field is None:
        return None
    candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
