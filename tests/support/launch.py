"""`qsr train`: as a job of the pool, as a real launch, by a script of launch/; and what a run has written."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tests.support.pool import Processes

LAUNCH = Path(__file__).parents[2] / "launch"  # the scripts


def qsr_job(argv: list[str], per_rank: list[list[str]] | None = None) -> tuple[int, str, str]:
    """The `qsr` command of one rank: exit code, standard output, standard error."""
    from qsr_engine.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    extra = per_rank[int(os.environ["RANK"])] if per_rank else []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*argv, *extra])
    return code, out.getvalue(), err.getvalue()


def spoiled_job(argv: list[str], step: int, spoil: Callable[[Any], None]) -> tuple[int, str]:
    """`qsr train` of one rank: exit code and standard error.

    Args:
        spoil: gets rank 0's first parameter before each forward of training after so many steps.
    """
    import torch

    loop: Any = importlib.import_module("qsr_engine.training.loop")
    make = loop.make_engine

    def make_spoiled(*args: Any) -> Any:
        engine: Any = make(*args)

        def hook(model: Any, _: Any) -> None:
            if model.training and engine.local_steps.step == step and os.environ["RANK"] == "0":
                with torch.no_grad():
                    spoil(next(model.parameters()))

        engine.module.register_forward_pre_hook(hook)
        return engine

    with mock.patch.object(loop, "make_engine", make_spoiled):
        code, _, err = qsr_job(argv)
    return code, err


def train(processes: Processes, recipe: Path, *overrides: str, ranks: int = 2) -> Path:
    """Train, and give the run's folder back."""
    name = f"run-{len(list((recipe.parent / 'runs').glob('*')))}"
    sets = [word for override in (*overrides, f"logging.name={name}") for word in ("--set", override)]
    for code, _, err in processes.run(qsr_job, ranks=ranks, argv=["train", str(recipe), *sets]):
        assert code == 0, err
    return recipe.parent / "runs" / name


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def workers(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "workers.jsonl").read_text().splitlines()]


def launch(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180, check=False)


def bin_folder() -> Path:
    return Path(sys.executable).parent


def start_script(*words: str, **environment: str) -> subprocess.Popen[str]:
    """A script of launch/, with this Python's programs in the path and the recipe's model on a CPU."""
    path = f"{bin_folder()}{os.pathsep}{os.environ['PATH']}"
    known = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path, **environment}
    return subprocess.Popen(words, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def interrupted_job(argv: list[str], at_step: int) -> int:
    """The `qsr train` of one rank that dies in the middle of a round."""
    from qsr_engine.training import loop as module

    original = module._Run._step

    def step(run: Any) -> bool:
        if run.engine.local_steps.step == at_step:
            raise KeyboardInterrupt
        return original(run)

    module._Run._step = step  # type: ignore[assignment,method-assign]
    try:
        return qsr_job(argv)[0]
    finally:
        module._Run._step = original  # type: ignore[method-assign]


@contextlib.contextmanager
def started_in(folder: Path, limit: float, **more: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts commands whose output goes to files in a folder, `output-0` and so on; whatever they have started is ended
    with the block.

    Args:
        limit: seconds for them to end then. more: variables of their environment.
    """
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "QSR_TEST": str(folder), **more}
        with (folder / f"output-{len(started)}").open("w") as output:
            process = subprocess.Popen(words, env=environment, stdout=output, stderr=output, text=True)
        started.append(process)
        return process

    yield start
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("QSR_TEST") == str(folder):
                process.kill()
        except psutil.Error:
            continue
    for opened in started:
        opened.wait(limit)


def variables_of(process: psutil.Process) -> dict[str, str]:
    """The environment of a process; none of one that has ended meanwhile."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.environ()
    return {}
