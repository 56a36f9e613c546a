"""Trackers of others (Weights & Biases, MLflow, ...), each behind Accelerate's interface: the extra `[trackers]`.

They get the figures that TensorBoard gets, on rank 0. How one is reached and where it keeps its runs, it reads from its
own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, ...).
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsr_engine.config.digest import flatten
from qsr_engine.config.strict import ConfigError


def check_services(names: Sequence[str]) -> None:
    """Raises ConfigError where one of them is not installed; nothing is imported here."""
    for name in names:
        missing = [module for module in ("accelerate", name) if importlib.util.find_spec(module) is None]
        if missing:
            raise ConfigError(
                f"logging.trackers holds {name!r}, and not installed is {' and '.join(missing)}; write "
                f"`pip install {' '.join(missing)}`, or leave it out"
            )


class Service:
    """One of Accelerate's trackers, of a run by this name. Where it fails, training goes on without it.

    Args:
        name: as LoggingConfig.trackers has it.
        recipe: as nested plain values, which it shows as the run's configuration.
    Raises:
        ConfigError: it cannot begin.
    """

    def __init__(self, name: str, run_dir: Path, recipe: Mapping[str, Any]) -> None:
        self._name, self._failed = name, False
        try:
            self._tracker = _begin(name, run_dir)
            self._tracker.store_init_configuration({key: _plain(value) for key, value in flatten(recipe)})
        except Exception as error:  # of any kind: each has its own
            raise ConfigError(
                f"logging.trackers: {name} cannot begin: {error}; mend that (WANDB_MODE=offline keeps its runs here), "
                "or leave it out"
            ) from error

    def log(self, values: Mapping[str, Any], step: int) -> None:
        if values and not self._failed:
            self._try(lambda: self._tracker.log(dict(values), step=step))

    def log_workers(self, values: Sequence[Mapping[str, float]], step: int) -> None:
        """They get the range over the workers, as scalars."""

    def close(self) -> None:
        self._try(self._tracker.finish)

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # a service that is not reached is no reason to end a run
            if not self._failed:
                warnings.warn(f"{self._name} failed ({error}); training goes on without it", stacklevel=4)
            self._failed = True


def _begin(name: str, run_dir: Path) -> Any:
    """A started tracker of Accelerate's, which belongs to this process alone."""
    import torch
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    threads = torch.get_num_threads()
    PartialState(cpu=not torch.cuda.is_available())  # which Accelerate's messages ask for; it takes the group that is
    torch.set_num_threads(threads)
    kind = LOGGER_TYPE_TO_CLASS[name]
    project = os.environ.get(f"{name.upper()}_PROJECT", "qsr_engine")
    if name == "mlflow":
        tracker = kind(project, run_name=run_dir.name)
    elif name in ("wandb", "trackio"):
        tracker = kind(project, name=run_dir.name, **({"dir": str(run_dir)} if name == "wandb" else {}))
    elif kind.requires_logging_directory:
        tracker = kind(run_dir.name, logging_dir=str(run_dir))
    else:
        tracker = kind(run_dir.name)
    tracker.main_process_only = False  # only rank 0 has it
    tracker.start()
    return tracker


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
