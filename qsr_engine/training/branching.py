"""A new run that begins with a checkpoint of another one, at its step: `qsr train RECIPE --from RUN`.

It may have another strategy, alpha, H, learning rate or anything else that leaves the model and the data as they were.
Where all of that is the same, it is the other run going on, bit for bit. Every worker takes over its optimizer's state,
as the paper's authors have it (`--multiple-optimizers 1`), or all take the mean, or begin anew. The other run is only
read. What its part cost counts in the new run's figures, which are those of a run from step 0.

A checkpoint from inside a round goes on in that round if the rule of the periods is the same; under another rule the
round ends there, and the next begins by the new one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from qsr_engine.checkpoint.find import find_alone, view
from qsr_engine.checkpoint.manifest import MANIFEST, MODEL_FILE, CheckpointError, sha256
from qsr_engine.config.digest import differences
from qsr_engine.config.may_differ import that_matter
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.membership.spelling import first_lines
from qsr_engine.records.run_folder import CHECKPOINTS, ORIGIN, RECIPE
from qsr_engine.training.from_recipe import Engine
from qsr_engine.training.resuming import check_same_data

_RULE = ("qsr.strategy", "qsr.h_", "qsr.alpha", "qsr.power", "qsr.switch_step", "qsr.total_steps", "qsr.lr.")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint with which a run begins.

    Args:
        run: folder of the run that has it.
        digest: SHA-256 of its manifest, in hex.
        optimizers: "own": each worker's state, where they are as many, else as qsr.on_other_workers; "mean"; "fresh".
    """

    run: str
    tag: str
    step: int
    digest: str
    optimizers: str = "own"

    @property
    def folder(self) -> Path:
        return Path(self.run) / CHECKPOINTS / self.tag

    @property
    def agreed(self) -> dict[str, Any]:
        """What must be the same on every rank; hosts may keep the run in other places, and other files of it."""
        return {"tag": self.tag, "step": self.step, "optimizers": self.optimizers}


def find_origin(place: str, recipe: Recipe, optimizers: str = "own") -> Origin:
    """The checkpoint that `--from` names for a resolved recipe: `RUN`, whose newest whole one it is, or one's folder.

    Raises:
        ConfigError: there is none, or the recipe's run ends before it, or is that run itself.
    """
    path = Path(os.path.abspath(place))
    run = path
    if not (path / RECIPE).is_file() and CHECKPOINTS in (path.name, path.parent.name):
        run = path.parent if path.name == CHECKPOINTS else path.parents[1]
    if not run.is_dir():
        raise ConfigError(f"--from {place}: there is no folder {run}; write that of a run, or RUN/{CHECKPOINTS}/TAG")
    if not (run / RECIPE).is_file():
        raise ConfigError(
            f"--from {place}: {run} is no run of `qsr train` (it has no {RECIPE}); write the folder of one"
        )
    if run.resolve() == recipe.run_dir.resolve():
        raise ConfigError(
            f"--from {place}: it is the folder of this run itself; go on with it with --resume, or write another name "
            "for the new one (`--set logging.name=NAME`)"
        )
    try:
        folder, manifest = find_alone(run / CHECKPOINTS if path == run else path)
    except CheckpointError as error:
        tags = sorted(tag for tag, (_, wrong) in view(run / CHECKPOINTS, None).items() if wrong is None)
        write = f"write one of {', '.join(tags)}" if tags else "logging.checkpoint_every and stop_at_step write some"
        raise ConfigError(f"--from {place}: {error}; {write}") from error
    if manifest.step >= recipe.last_step:
        key = "qsr.total_steps" if recipe.stop_at_step is None else "stop_at_step"
        raise ConfigError(
            f"--from {place}: {folder.name} is of step {manifest.step}, and {key} is {recipe.last_step}; write an "
            "earlier checkpoint, or a longer run"
        )
    return Origin(str(run), folder.name, manifest.step, sha256(folder / MANIFEST), optimizers)


def read_origin(run_dir: Path) -> Origin | None:
    """That of the run in a folder, for one that died before its first checkpoint; None: it began at step 0.

    Raises:
        ConfigError: what is written there cannot be read.
    """
    try:
        return Origin(**json.loads((run_dir / ORIGIN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{run_dir / ORIGIN}: cannot be read ({error}); begin another run with --from") from error


def origin_text(origin: Origin) -> str:
    """What the run's folder keeps, and read_origin() reads."""
    return json.dumps(dataclasses.asdict(origin), indent=2) + "\n"


def changes_since(origin: Origin, recipe: Recipe, model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The keys of a recipe that are others than in the run with whose checkpoint it begins: (there, here).

    Raises:
        ConfigError: the checkpoint is of a model with other parameters, or of an optimizer whose state cannot be taken
            over; it was written again since it was chosen, or its run is not there any more.
    """
    _check_model(origin, model)
    if (origin.folder / MANIFEST).is_file() and sha256(origin.folder / MANIFEST) != origin.digest:
        raise ConfigError(f"{origin.folder}: it was written again since this run began with it; begin another run")
    if not (Path(origin.run) / RECIPE).is_file():
        raise ConfigError(
            f"{recipe.run_dir}: it begins with the checkpoint {origin.tag} of {origin.run}, and that run is not there "
            "any more; put it back, or begin another run"
        )
    found = differences(load_recipe(Path(origin.run) / RECIPE).model_dump(), recipe.model_dump())
    changes = {key: (then, now) for key, then, now in that_matter(found, "branch")}
    for key in ("engine", "optimizer.type"):
        if key in changes and origin.optimizers != "fresh":
            then, now = changes[key]
            raise ConfigError(
                f"{origin.folder}: {key} was {then!r} and is {now!r}, which cannot take over the optimizer's state; "
                "begin with a new one (--optimizer-states fresh), or write the same"
            )
    return changes


def _check_model(origin: Origin, model: nn.Module) -> None:
    try:
        with safe_open(origin.folder / MODEL_FILE, framework="pt") as file:
            there = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # on another host, or torn: which the engine finds
        return
    here = {name: list(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in model.named_buffers()}
    lines = [
        f"  {name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
        for name in sorted({*here, *there} - buffers)
        if there.get(name) != here.get(name)
    ]
    if lines:
        raise ConfigError(
            f"{origin.folder}: it is the checkpoint of another model:\n{first_lines(lines)}\n"
            f"Write that of its run ({origin.run}), blocks model and data"
        )


def begin_from(
    engine: Engine, recipe: Recipe, origin: Origin, changed: Mapping[str, tuple[Any, Any]], data: str
) -> dict[str, Any]:
    """Load the checkpoint into the engine of a new run, on all ranks. Returns what this rank saved in it.

    Args:
        changed: as changes_since() says.
        data: digest of the data's index.
    Raises:
        ConfigError: it is of other data.
        CheckpointError: it is not whole, or cannot be taken over.
    """
    if os.environ["RANK"] == "0":
        warnings.warn(f"{recipe.run_dir}: {_spelled(origin, changed)}", stacklevel=2)
    options = {"mean": {"mean_of_optimizer_states": True}, "fresh": {"load_optimizer_states": False}}
    folder = Path(origin.run) / CHECKPOINTS
    _, client = engine.load_checkpoint(folder, tag=origin.tag, **options.get(origin.optimizers, {}))
    client = client or {}
    check_same_data(folder, client, data)
    if not engine.local_steps.on_boundary and any(key.startswith(_RULE) for key in changed):
        engine.end_round()
    return client


def _spelled(origin: Origin, changed: Mapping[str, tuple[Any, Any]]) -> str:
    states = {"mean": ", every worker with the mean of the optimizer states", "fresh": ", every optimizer anew"}
    lines = [f"  {key} was {then!r} and is {now!r}" for key, (then, now) in changed.items()]
    settings = "with\n" + "\n".join(lines) if lines else "with the same settings"
    return f"begins at step {origin.step} from {origin.folder}{states.get(origin.optimizers, '')}, {settings}"
