"""The tables of keys in docs/recipes.md and of refused keys in docs/limits.md, from `qsr_engine.config`.

    python -m docs.scripts.keys      # in the repository's root, after a change of a model

A key's meaning is the string below its field.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qsr_engine.config.deepspeed_keys import REFUSED_KEYS, REMOVED_KEYS
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.recipe import Recipe, RecipeQSR
from qsr_engine.config.strict import submodel

PAGE = Path(__file__).parents[1] / "recipes.md"
LIMITS = Path(__file__).parents[1] / "limits.md"
START = "<!-- `python -m docs.scripts.keys` writes what follows. -->\n"


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field of a model, in one line; those of its bases too."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(body, ast.ClassDef)
            for field, after in zip(body.body, [*body.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
                    found[field.target.id] = " ".join(str(text).split()) if text else found.get(field.target.id, "")
    return found


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A line for each key of a model and of the blocks in it.

    Raises:
        ValueError: a key has no meaning.
    """
    text = meanings(model)
    for name, field in model.model_fields.items():
        path, block = prefix + name, submodel(model, name)
        if text[name]:
            cells = [f"`{path}`", "" if text[name].startswith("by default") else _default(field), text[name]]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
        elif block is None:
            raise ValueError(f"{model.__name__}.{name} has no meaning; write it as a string below the field")
        if block is not None:
            yield from rows(block, f"{path}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.default
    if isinstance(value, BaseModel):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def tables() -> str:
    """Every key of a recipe, block by block, and then those of the block `qsr`."""
    blocks: dict[str, list[str]] = {
        name: [] for name in (*Recipe.model_fields, "") if not name or submodel(Recipe, name)
    }
    for row in rows(Recipe):
        first = row.split("`")[1].partition(".")[0]
        blocks[first if first in blocks else ""].append(row)
    del blocks["qsr"]
    text = "".join(_table(f"`{name}`" if name else "Keys outside of blocks", lines) for name, lines in blocks.items())
    block = list(rows(QSRConfig))
    in_recipes = [row for row in rows(RecipeQSR) if row.split("`")[1] not in {other.split("`")[1] for other in block}]
    text += _table("`qsr`, here and in a DeepSpeed configuration", block)
    return text + _table("`qsr`, in recipes only", in_recipes)


def _table(title: str, lines: list[str]) -> str:
    return f"\n## {title}\n\n| key | default | meaning |\n| --- | --- | --- |\n{''.join(lines)}"


def page() -> str:
    """What docs/recipes.md should be: its text as it stands, and the tables."""
    return PAGE.read_text(encoding="utf-8").partition(START)[0] + START + tables()


def limits() -> str:
    """What docs/limits.md should be: its text as it stands, and the keys of DeepSpeed that are refused."""
    reasons = {key: why.removeprefix("and ") for key, (_, why) in REFUSED_KEYS.items()}
    reasons |= dict.fromkeys(sorted(REMOVED_KEYS), "DeepSpeed 0.19.8 has removed it; leave it out")
    lines = [f"| `{key}` | {reason} |\n" for key, reason in reasons.items()]
    head = "\n## Keys of DeepSpeed that are refused\n\n| key | why, and what to write |\n| --- | --- |\n"
    return LIMITS.read_text(encoding="utf-8").partition(START)[0] + START + head + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    LIMITS.write_text(limits(), encoding="utf-8")
