"""`qsr hosts`: whether the hosts of a hostfile can train together."""

from __future__ import annotations

import argparse

from qsr_engine.cli.arguments import whole_number
from qsr_engine.membership.hosts import check_hosts


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = commands.add_parser("hosts", help="ask all hosts of a hostfile: do they answer, with the same versions?")
    command.add_argument("hostfile", help="DeepSpeed's: a line a host, `NAME slots=GPUS`")
    command.add_argument("--ssh-port", type=whole_number, metavar="N", help="where ssh's configuration does not say it")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line a host."""
    print(check_hosts(args.hostfile, ["-p", str(args.ssh_port)] if args.ssh_port else []))
    return 0
