"""`qsr hosts`: whether the hosts of a hostfile can train together."""

from __future__ import annotations

import argparse

from qsr_engine.cli.arguments import add_command, whole_number
from qsr_engine.membership.hosts import check_hosts


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = add_command(
        commands,
        "hosts",
        "Ask all hosts of a hostfile whether they answer, and with the same versions.",
        more="It asks through ssh, as DeepSpeed's launcher starts its ranks, and names every host that differs. "
        "`qsr doctor` looks at this host alone.",
        examples=["qsr hosts hostfile", "qsr hosts hostfile --ssh-port 2222"],
    )
    command.add_argument("hostfile", help="DeepSpeed's: a line a host, `NAME slots=GPUS`")
    command.add_argument("--ssh-port", type=whole_number, metavar="N", help="where ssh's configuration does not say it")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line a host."""
    print(check_hosts(args.hostfile, ["-p", str(args.ssh_port)] if args.ssh_port else []))
    return 0
