"""What a rank reads of the launcher that started it: who it is, and whether it was started again in vain."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from qsr_engine.cli.guard import LAUNCH
from qsr_engine.config.strict import ConfigError
from qsr_engine.membership.signals import STOPPED_FILE


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


def restarted() -> bool:
    """Whether torchrun's agent has started this rank again, after another one had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def hopeless() -> str | None:
    """In a rank that was started again: the error of an earlier attempt that would come again; None if there is none.

    torchrun starts ranks again whatever their exit code is.
    """
    file = _error_file()
    return file.read_text(encoding="utf-8") if restarted() and file is not None and file.exists() else None


def stopped_already() -> bool:
    """In a rank that was started again: whether the run was asked to stop in the meantime."""
    path = os.environ.get(STOPPED_FILE)
    return restarted() and path is not None and LAUNCH in os.environ and asked_file(Path(path)).exists()


def no_restart(error: Exception) -> None:
    """Note an error of this rank after which starting it again is of no use."""
    file = _error_file()
    if file is not None:
        file.write_text(str(error), encoding="utf-8")


def first_to_say(text: str, *, consequence: bool) -> bool:
    """Whether no other rank of this launch, on this host, has said this error, which all of them may find.

    Args:
        consequence: it tells of another rank's failure, and of no use beside what that one says.
    Returns:
        True where `qsr train` has not started the ranks, since nobody knows then what others say.
    """
    path = os.environ.get(STOPPED_FILE)
    if not path or LAUNCH not in os.environ:
        return True
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        with Path(path).with_name(f"said-{attempt}").open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            said = file.read()
            if text in said or (consequence and said):
                return False
            file.write(f"{text}\n")
    except OSError:
        return True
    return True


def _error_file() -> Path | None:
    """Beside the file that says that a run has stopped when asked to; only where launch() has started the rank."""
    path = os.environ.get(STOPPED_FILE)
    return Path(path).with_name("error") if path and LAUNCH in os.environ else None


def asked_file(stopped: Path) -> Path:
    """Beside the file that says that a run has stopped: the launcher was asked to stop it."""
    return stopped.with_name("asked")
