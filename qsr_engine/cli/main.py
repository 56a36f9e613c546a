"""The `qsr` command, which is `python -m qsr_engine` too: one file a sub-command, with `add(commands)` and `run(args)`.

Errors that are the user's to mend end the command with one message and no traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from qsr_engine.cli import export, hosts, plan, report, shards, train
from qsr_engine.cli.errors import CommandError
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import DataError
from qsr_engine.membership.hosts import HostError
from qsr_engine.records.runs import ReportError

USER_ERROR = 2  # exit code, as argparse's own


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (CommandError, ConfigError, DataError, HostError, ReportError) as error:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"qsr: error{rank}: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsr", description="Local-step training with the Quadratic Synchronization Rule"
    )
    # DeepSpeed's launcher puts it before the command; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, plan, export, report, hosts, shards):
        command.add(commands)
    return parser
