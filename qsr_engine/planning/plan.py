"""`qsr plan RECIPE`: what a run's schedule will be, before anything is started: rounds, periods, communication.

RECIPE is a recipe, or a DeepSpeed configuration with a `"qsr"` block. Shards are not needed where the number of
samples is known. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsr_engine.config.deepspeed import split_deepspeed_config
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import load_recipe, resolve_recipe
from qsr_engine.config.strict import ConfigError, validate
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import read_index
from qsr_engine.records.runs import strategy_label
from qsr_engine.schedule import Round, averagings_percent, learning_rate, rounds

PARTS = 10  # of the run, in the table


@dataclass(frozen=True)
class Plan:
    """The schedule of a run.

    Args:
        rounds: all of them, in order.
        steps_per_epoch: None where the number of samples is not known.
        recipe: as it was read; None for a DeepSpeed configuration.
        stop_at_step: where the run stops, with these rounds; None: at its end.
        deepspeed: that configuration, without its block "qsr" and not checked; None for a recipe.
    """

    name: str
    qsr: QSRConfig
    rounds: Sequence[Round]
    steps_per_epoch: int | None
    recipe: Recipe | None = None
    stop_at_step: int | None = None
    deepspeed: Mapping[str, Any] | None = None

    @property
    def averagings_percent(self) -> float:
        """Averagings over steps."""
        return averagings_percent(self.rounds)

    @property
    def longest_round(self) -> Round:
        """The first of them, where several are as long."""
        return max(self.rounds, key=lambda round_: round_.length)

    def table(self) -> Iterator[dict[str, Any]]:
        """Step, epoch, learning rate and H at every tenth of the run; what is not known is None."""
        total, remaining = self.qsr.total_steps, iter(self.rounds)
        current = next(remaining)
        for step in sorted({min(total - 1, part * total // PARTS) for part in range(PARTS + 1)}):
            while step >= current.start + current.length:
                current = next(remaining)
            lr = None if self.qsr.lr is None else learning_rate(self.qsr.lr, step, total)
            yield {"step": step, "epoch": self.epoch(step), "lr": lr, "period": current.length}

    def epoch(self, step: int) -> float | None:
        return None if self.steps_per_epoch is None else step / self.steps_per_epoch

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "recipe": self.name,
            "strategy": label_of(self.qsr),
            "total_steps": self.qsr.total_steps,
            "stop_at_step": self.stop_at_step,
            "steps_per_epoch": self.steps_per_epoch,
            "rounds": len(self.rounds),
            "averagings_percent": self.averagings_percent,
            "communication_percent": self.averagings_percent,  # its old name
            "longest_round": _as_dict(self.longest_round),
            "last_round": _as_dict(self.rounds[-1]),
            "table": list(self.table()),
        }

    def text(self) -> str:
        """What is printed without `--json`."""
        epochs = self.epoch(self.qsr.total_steps)
        length = "" if epochs is None else f" ({epochs:g} epochs of {self.steps_per_epoch} steps)"
        lines = [
            f"{self.name}: {label_of(self.qsr)}",
            f"{self.qsr.total_steps} steps{length}, {len(self.rounds)} rounds, "
            f"{self.averagings_percent:.1f} % of parallel's averagings",
            f"longest round: {self._spell(self.longest_round)}",
            f"last round: {self._spell(self.rounds[-1])}",
            *self._stop(),
            "",
            f"{'step':>9} {'epoch':>7} {'lr':>10} {'H':>8}",
        ]
        for row in self.table():
            epoch = "-" if row["epoch"] is None else f"{row['epoch']:.1f}"
            lr = "-" if row["lr"] is None else f"{row['lr']:.3e}"
            lines.append(f"{row['step']:>9} {epoch:>7} {lr:>10} {row['period']:>8}")
        return "\n".join(lines)

    def _stop(self) -> list[str]:
        if self.stop_at_step is None:
            return []
        ended = sum(round_.start + round_.length <= self.stop_at_step for round_ in self.rounds)
        epoch = self.epoch(self.stop_at_step)
        place = f"step {self.stop_at_step}" + ("" if epoch is None else f", in epoch {epoch:.1f}")
        return [f"stops at {place} (stop_at_step), after {ended} of these rounds; other figures are the whole run's"]

    def _spell(self, round_: Round) -> str:
        epoch = self.epoch(round_.start)
        return f"{round_.length} steps from step {round_.start}" + ("" if epoch is None else f", in epoch {epoch:.1f}")


def label_of(qsr: QSRConfig) -> str:
    """As reports call a strategy."""
    return strategy_label(qsr.model_dump(exclude_none=True))


def _as_dict(round_: Round) -> dict[str, int]:
    return {"start_step": round_.start, "length": round_.length}


def make_plan(path: str | Path, *, samples: int | None = None, overrides: Sequence[str] = ()) -> Plan:
    """Plan a recipe, or a DeepSpeed configuration (its name ends in .json).

    Args:
        samples: of the training split, where the recipe does not say it and its shards are elsewhere.
        overrides: of a recipe, `key.path=value`.
    Raises:
        ConfigError, DataError: it cannot be read or cannot be run, or its length is not known.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        return _plan_recipe(path, samples, overrides)
    if overrides or samples is not None:
        option = "--set" if overrides else "--samples"
        raise ConfigError(f"{path}: {option} is for recipes; a DeepSpeed configuration counts in steps, so edit it")
    deepspeed, qsr = split_deepspeed_config(path)
    return Plan(str(path), qsr, _rounds(path, qsr), None, deepspeed=deepspeed)


def _plan_recipe(path: Path, samples: int | None, overrides: Sequence[str]) -> Plan:
    if samples is not None:
        overrides = [*overrides, f"data.train_samples={samples}"]
    recipe = load_recipe(path, overrides, places=False)
    samples = recipe.data.train_samples or _samples_of_shards(path, recipe)
    if samples is None:
        per_epoch, resolved = None, recipe
    else:
        per_epoch, resolved = samples // recipe.batch.train_batch_size, resolve_recipe(recipe, samples)
    return plan_of(str(path), resolved, per_epoch, recipe)


def plan_of(name: str, resolved: Recipe, steps_per_epoch: int | None, recipe: Recipe | None = None) -> Plan:
    """The plan of a recipe that is known in steps.

    Args:
        recipe: as it was read; None: the resolved one.
    """
    qsr = validate(QSRConfig, resolved.qsr.model_dump(exclude_none=True), where=name, prefix="qsr.")
    return Plan(name, qsr, _rounds(Path(name), qsr), steps_per_epoch, recipe or resolved, resolved.stop_at_step)


def _samples_of_shards(path: Path, recipe: Recipe) -> int | None:
    """From the index of the shards; None where it is not there, and the recipe counts in steps alone."""
    try:
        return read_index(recipe.data.shards).split(recipe.data.train).samples
    except DataError as error:
        qsr = recipe.qsr
        epochs = (recipe.epochs, recipe.stop_at_epoch, qsr.switch_epoch, qsr.lr.warmup_epochs, qsr.lr.decay_epochs)
        if all(duration is None for duration in epochs):
            return None
        raise ConfigError(
            f"{path}: it counts in epochs, and how many samples an epoch has is not known: write --samples N, or "
            f"data.train_samples ({error})"
        ) from error


def rounds_of(qsr: QSRConfig) -> Iterator[Round]:
    """All rounds of a run whose periods do not follow a scheduler of the caller's own."""
    return rounds(qsr) if qsr.strategy == "qsr" and qsr.lr is not None else rounds(qsr, lambda step: 1.0)


def _rounds(path: Path, qsr: QSRConfig) -> list[Round]:
    if qsr.lr is None and qsr.strategy == "qsr" and qsr.alpha:
        raise ConfigError(
            f"{path}: there is no qsr.lr block, and H follows the learning rate, which your own scheduler sets; write "
            "the block, here or in a copy"
        )
    return list(rounds_of(qsr))
