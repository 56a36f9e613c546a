"""The `qsr` command, which is `python -m qsr_engine` too: one file a sub-command, with `add(commands)` and `run(args)`.

Errors that are the user's to mend end the command with one message and no traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from qsr_engine.cli import doctor, export, hosts, init, lighthouse, plan, report, shards, train
from qsr_engine.cli.errors import ERROR, USAGE, CommandError, UsageError
from qsr_engine.cli.launched import first_to_say
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import DataError
from qsr_engine.membership.hosts import HostError
from qsr_engine.membership.versions import versions
from qsr_engine.records.runs import ReportError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (CommandError, ConfigError, DataError, HostError, ReportError) as error:
        if first_to_say(str(error), consequence=getattr(error, "consequence", False)):
            rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
            print(f"qsr: error{rank}: {error}", file=sys.stderr, flush=True)
        return USAGE if isinstance(error, UsageError) else ERROR
    except KeyboardInterrupt:
        return 130


class _Version(argparse.Action):
    """Found only when they are asked for, as the sources are read for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        found = versions()
        others = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "deepspeed"))
        print(f"qsr_engine {found['qsr_engine']} ({others})")
        parser.exit()


class _Completion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: object, shell: object, *__: object) -> None:
        try:
            import shtab
        except ImportError:
            parser.error('shtab writes it, and is not installed; write `pip install "qsr-engine[completion]"`')
        print(shtab.complete(parser, shell=str(shell)))
        parser.exit()


_EPILOG = """\
a first run:
  qsr shards digits data/digits                                    # data
  qsr init --model timm/vit_tiny_patch16_224 --shards data/digits  # a recipe, my.yaml
  qsr train my.yaml --dry-run                                      # check it
  qsr train my.yaml
  qsr report runs

exit codes: 0 done, 1 error, 2 wrong command, 75 stopped (go on with --resume),
128 and more ended by a signal. `qsr COMMAND --help` has examples of each."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsr",
        description="Train with local steps under the Quadratic Synchronization Rule: every worker takes H optimizer\n"
        "steps by itself, then the workers average their parameters.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the versions that matter, and end")
    shells = ["bash", "zsh", "tcsh"]
    parser.add_argument(
        "--print-completion", action=_Completion, choices=shells, help="print a script that completes words in a shell"
    )
    # DeepSpeed's launcher puts it before the command; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (init, train, plan, report, export, shards, doctor, hosts, lighthouse):
        command.add(commands)
    return parser
