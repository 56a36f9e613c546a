"""Recipes: one YAML file a run, read, merged over the one it extends, overridden, checked and resolved.

The model of a recipe is `recipe.Recipe`; this file turns files and `--set` overrides into one. Durations in epochs
become steps in `resolve_recipe`, at the edge; the core of the package sees steps only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.strict import ConfigError, validate


class _RecipeLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-6 as a number (YAML 1.1 reads a string) and refuses a key given twice.

    It refuses aliases too: an override of one place would change the others, and a few lines of them fill the memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"the alias *{event.anchor} is not read here; write the value again, or use extends"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key, str) else repr(key))
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def load_recipe(path: str | Path, overrides: Iterable[str] = (), *, places: bool = True) -> Recipe:
    """Read a recipe, merge it over the one it extends, apply `key.path=value` overrides and check it.

    `extends: NAME.yaml` at the top of a recipe is a path relative to that recipe. Mappings merge key by key; any
    other value replaces. `logging.name` is the file's stem where the recipe does not say it. `${NAME}` in a path is an
    environment variable of this host.

    Args:
        places: False leaves a variable that is not set in its path, for who needs no file of the recipe's.
    Raises:
        ConfigError: the file is missing or not YAML, or a key is unknown, of a wrong type or impossible; or a path
            names a variable that is not set.
    """
    path = Path(path)
    raw = _read_with_base(path, ())
    for override in overrides:
        _apply_override(raw, override)
    for block, key in _PATHS:
        values = raw.get(block)
        if isinstance(values, dict) and key in values:
            values[key] = _with_variables_in(values[key], f"{path}: {block}.{key}", needed=places)
    logging = raw.setdefault("logging", {})
    if isinstance(logging, dict) and logging.get("name") is None:
        logging["name"] = re.sub(r"^\W+|[^\w.\-]+", "-", path.stem).lstrip("-") or "run"
    recipe = validate(Recipe, raw, where=str(path))
    if (recipe.epochs is None) == (recipe.qsr.total_steps is None):
        found = "neither" if recipe.epochs is None else "both"
        raise ConfigError(f"{path}: found {found} of epochs and qsr.total_steps; write exactly one of them")
    return recipe


_PATHS = (("data", "shards"), ("data", "cache_dir"), ("logging", "dir"))


def _with_variables_in(value: Any, where: str, *, needed: bool) -> Any:
    """A path, or a list of them, as _with_variables() gives it; anything else as it is."""
    if isinstance(value, list):
        return [_with_variables_in(part, where, needed=needed) for part in value]
    return _with_variables(value, where, needed=needed) if isinstance(value, str) else value


def _with_variables(text: str, where: str, *, needed: bool = True) -> str:
    """A path with the values of its `${NAME}`. Raises ConfigError: one is needed and not set, or not written so."""

    def value_of(found: re.Match[str]) -> str:
        name = found[1]
        if not re.fullmatch(r"\$\{[A-Za-z_]\w*\}", found[0], re.ASCII):
            raise ConfigError(f"{where}: found {text!r}; write ${{NAME}}, with the name of an environment variable")
        if not os.environ.get(name):
            if not needed:
                return found[0]
            what = "empty" if name in os.environ else "not set"
            raise ConfigError(
                f"{where} is {text!r}, and the environment variable {name} is {what} on this host; set it "
                f"(`export {name}=...`), or write the path itself"
            )
        return os.environ[name]

    return re.sub(r"\$\{([^}]*)\}?", value_of, text)


def _read_with_base(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    try:
        resolved = path.resolve()
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this recipe: {error.strerror or error}") from error
    except (ValueError, RuntimeError) as error:  # a name with a NUL, or links in a circle
        raise ConfigError(f"{str(path)!r}: cannot read this recipe: {error}") from error
    if resolved in chain:
        names = " -> ".join(str(step) for step in (*chain, resolved))
        raise ConfigError(f"{path}: recipes extend one another in a circle: {names}")
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: more than {_MOST_BYTES} bytes, and no recipe has so many")
    try:
        raw = _load_yaml(content.decode())
    except ValueError as error:
        raise ConfigError(f"{path}: not a YAML file that can be read: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of blocks (model, data, ...); found {type(raw).__name__}")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: found {base!r}; write the path of one recipe, relative to this file")
    base = _with_variables(base, f"{path}: extends")
    return _merge(_read_with_base(path.parent / base, (*chain, path.resolve())), raw)


_MOST_BYTES = 2**22  # of a recipe


def _load_yaml(text: str) -> Any:
    """Raises ValueError for all that is no YAML, or has values that no recipe has."""
    try:
        value = yaml.load(text, Loader=_RecipeLoader)
    except (
        Exception
    ) as error:  # PyYAML's constructors raise anything for `!!int x`, 2001-99-99 or thousands of brackets
        raise ValueError(str(error) or type(error).__name__) from error
    _check_values(value)
    return value


def _check_values(value: Any, depth: int = 0) -> None:
    """Raises ValueError for what Python cannot print or read again, and what is nested too deep to be a recipe."""
    if depth > _DEEPEST:
        raise ValueError(f"more than {_DEEPEST} blocks are inside one another, and no recipe has so many")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the key {key!r:.60} is no word; write it in quotes")
            _check_values(inner, depth + 1)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            _check_values(inner, depth + 1)
    elif isinstance(value, int) and abs(value) >= _LARGEST:
        raise ValueError("a whole number has more than 100 digits")


_DEEPEST = 64
_LARGEST = 10**100


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: write key.path=value, for example --set qsr.h_base=4")
    try:
        value = _load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error
    target = raw
    if keys[:2] == ["qsr", "membership"] and len(keys) > 2 and isinstance(raw.get("qsr"), dict):
        named = raw["qsr"].get("membership")
        if isinstance(named, str):  # the short spelling of a block
            raw["qsr"]["membership"] = {"way": named}
    for depth, key in enumerate(keys[:-1]):
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {'.'.join(keys[: depth + 1])} is not a block")
    target[keys[-1]] = value


def resolve_recipe(recipe: Recipe, samples: int) -> Recipe:
    """Turn durations in epochs into steps; the result has total_steps and no epochs.

    Args:
        recipe: as load_recipe() gives it.
        samples: number of training samples in an epoch. An epoch is samples // train_batch_size steps; what is left
            over is not seen in that epoch.

    Raises:
        ConfigError: fewer samples than one batch, other than data.train_samples, or durations that contradict one
            another.
    """
    if recipe.data.train_samples not in (None, samples):
        raise ConfigError(
            f"data.train_samples is {recipe.data.train_samples}, and the split {recipe.data.train!r} has {samples} "
            f"samples; write {samples}, or null to take what the shards have"
        )
    steps_per_epoch = samples // recipe.batch.train_batch_size
    if steps_per_epoch == 0:
        raise ConfigError(
            f"batch.train_batch_size is {recipe.batch.train_batch_size} and the split {recipe.data.train!r} has "
            f"{samples} samples, fewer than one batch for every worker; write a smaller batch or give more data"
        )
    raw = recipe.model_dump(exclude_unset=True)
    epochs = raw.pop("epochs", None)
    qsr = raw["qsr"]
    if epochs is not None:
        qsr["total_steps"] = max(1, _steps(epochs, steps_per_epoch, "epochs"))
    _epochs_to_steps(raw, "stop_at_epoch", "stop_at_step", steps_per_epoch)
    _epochs_to_steps(qsr, "switch_epoch", "switch_step", steps_per_epoch, "qsr.", least=0)
    _epochs_to_steps(qsr["lr"], "warmup_epochs", "warmup_steps", steps_per_epoch, "qsr.lr.", least=0)
    _epochs_to_steps(qsr["lr"], "decay_epochs", "decay_steps", steps_per_epoch, "qsr.lr.")
    _epochs_to_steps(raw["logging"], "eval_every_epochs", "eval_every", steps_per_epoch, "logging.")
    validate(QSRConfig, qsr, where="recipe", prefix="qsr.")
    resolved = validate(Recipe, raw, where="recipe")
    if resolved.last_step > qsr["total_steps"]:
        written = "stop_at_step is"
        if recipe.stop_at_epoch is not None:
            written = f"stop_at_epoch is {recipe.stop_at_epoch:g}, after step"
        raise ConfigError(
            f"{written} {resolved.last_step}, and qsr.total_steps is {qsr['total_steps']}; write one within the run, "
            "or null"
        )
    return resolved


def _epochs_to_steps(
    block: dict[str, Any], epochs_key: str, steps_key: str, per_epoch: int, path: str = "", least: int = 1
) -> None:
    """Replace a number of epochs, or several, by steps; `least` is the fewest steps that mean something."""
    epochs = block.pop(epochs_key, None)
    if epochs is None:
        return
    if block.get(steps_key):
        raise ConfigError(f"{path}{epochs_key} and {path}{steps_key} are both given; write one of them")
    name, many = f"{path}{epochs_key}", isinstance(epochs, list)
    steps = [_steps(e, per_epoch, name) for e in (epochs if many else [epochs])]
    if steps and min(steps) < least:
        raise ConfigError(
            f"{name} is {min(epochs) if many else epochs:g}, and an epoch has {per_epoch} steps; write at least one "
            f"step, or {path}{steps_key}: {[1] if many else 1}"
        )
    block[steps_key] = steps if many else steps[0]


def _steps(epochs: float, per_epoch: int, name: str) -> int:
    if epochs * per_epoch >= 2**63:
        raise ConfigError(f"{name} is {epochs:g}, more steps than can be counted; write fewer")
    return round(epochs * per_epoch)


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; load_recipe() reads it back to an equal one."""
    raw = recipe.model_dump(exclude_none=True)
    return yaml.dump(raw, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)


class _RecipeDumper(yaml.SafeDumper):
    """Writes a value that stands in two places twice, since aliases are not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
