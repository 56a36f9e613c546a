"""What ends a command with one message and no traceback, and the exit codes of `qsr`.

0 is success, and 75 a run that was asked to stop and goes on with --resume (`membership/signals.py`). A command that a
signal ends gives 128 and the signal's number, as shells do.
"""

from __future__ import annotations

from qsr_engine.config.strict import ConfigError

ERROR = 1  # exit code: something was wrong, and the message says what
USAGE = 2  # exit code: the words of the command do not fit together; argparse's own


class CommandError(Exception):
    """An error of a sub-command that the user can mend, whatever part of the package has found it.

    Args:
        consequence: another rank has failed before, and its own message says why.
    """

    def __init__(self, reason: object, *, consequence: bool = False) -> None:
        super().__init__(reason)
        self.consequence = consequence


class UsageError(ConfigError):
    """Options that contradict one another."""
