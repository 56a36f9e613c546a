"""The launchers that start the ranks of `qsr train` and `qsr plan --measure`, and what they tell a rank.

DeepSpeed's launcher starts the engine `deepspeed`, torchrun the engine `fsdp`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Sequence
from types import FrameType

import psutil

from qsr_engine.config import ConfigError, Recipe, check_world_size
from qsr_engine.recipe import resolve_recipe_batch

_LAUNCH = "QSR_ENGINE_LAUNCH"  # in the environment of all processes of one launch


def started_by_a_launcher() -> bool:
    """Whether a launcher started this rank: RANK is set. Raises ConfigError if what it sets beside it is not right."""
    if "RANK" not in os.environ:
        return False
    numbers = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    found = {**numbers, "MASTER_ADDR": os.environ.get("MASTER_ADDR")}
    wrong = [name for name, value in numbers.items() if value is None or not value.isdecimal()]
    wrong += [] if found["MASTER_ADDR"] else ["MASTER_ADDR"]
    if not wrong and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        wrong = ["RANK", "WORLD_SIZE"]
    if wrong:
        spelled = ", ".join(f"{name}={found[name]}" if found[name] is not None else f"no {name}" for name in wrong)
        raise ConfigError(
            f"RANK is set, so a launcher is taken to have started this process, and found was: {spelled}. deepspeed "
            "and torchrun set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; unset RANK to start one"
        )
    return True


def launch(recipe: Recipe, ranks: int | None, words: Sequence[str]) -> int:
    """Start `python -m qsr_engine` with these words in the ranks of this host, and wait. Returns the exit code.

    Args:
        ranks: None for one a GPU.
    Raises:
        ConfigError: the recipe cannot be run by so many ranks.
    """
    if ranks is not None:
        check_world_size(ranks, recipe.qsr.worker_size)
        resolve_recipe_batch(recipe, ranks)
    launcher = _torchrun(ranks) if recipe.engine == "fsdp" else _deepspeed(ranks)
    return _run([*launcher, "--module", "qsr_engine", *words])


def _deepspeed(ranks: int | None) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(_free_port())]
    return [*launcher, *(["--num_gpus", str(ranks)] if ranks is not None else []), "--log_level", "error"]


def _torchrun(ranks: int | None) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", "auto" if ranks is None else str(ranks)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _run(command: list[str]) -> int:
    """Run the launcher in a session of its own, and leave nothing of it behind.

    DeepSpeed's launcher leaves its processes behind when it is terminated, and torchrun those whose agent was killed,
    in sessions of their own. So a signal goes to all of them, and when the launcher has ended, whatever is left of this
    launch is terminated too; a variable of the environment tells which processes those are.
    """
    launch = uuid.uuid4().hex
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, _LAUNCH: launch})
    received = 0

    def terminate() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)

    def terminate_what_is_left() -> None:
        terminate()
        for other in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if other.pid != os.getpid() and other.environ().get(_LAUNCH) == launch:
                    other.terminate()

    def stop(signum: int, _: FrameType | None) -> None:
        nonlocal received
        received = signum
        terminate()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        code = process.wait()
    finally:
        terminate_what_is_left()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received if received else code if code >= 0 else 128 - code
