"""`qsr lighthouse`: where workers that come and go find out who is there."""

from __future__ import annotations

import argparse
import socket
import threading

from qsr_engine.cli.arguments import add_command, whole_number
from qsr_engine.cli.errors import CommandError
from qsr_engine.config.membership import MembershipConfig
from qsr_engine.config.strict import validate

PORT = 29510  # as torchft's own


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = add_command(
        commands,
        "lighthouse",
        "Tell the workers of `qsr train --elastic` on several hosts who is there.",
        more="It runs until it is ended, on one of the hosts, and prints the address to give to all of them as "
        "TORCHFT_LIGHTHOUSE. It keeps nothing: one that was killed is started again at its port, and the run goes on.",
        examples=["qsr lighthouse", "qsr lighthouse --port 29600 --timeout-seconds 30 --grace-seconds 60"],
    )
    command.add_argument("--port", type=whole_number, default=PORT, help=f"default: {PORT}")
    command.add_argument(
        "--timeout-seconds",
        type=float,
        default=10.0,
        help="as the recipe's qsr.membership.timeout_seconds (default: 10)",
    )
    command.add_argument(
        "--grace-seconds",
        type=float,
        help="as the recipe's qsr.membership.grace_seconds, which has no effect without (default: none)",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until the process is ended."""
    from qsr_engine.membership.quorum import LIGHTHOUSE, start_lighthouse

    given = {"way": "torchft", "timeout_seconds": args.timeout_seconds, "grace_seconds": args.grace_seconds}
    membership = validate(MembershipConfig, given, where="qsr lighthouse")
    try:
        lighthouse = start_lighthouse(args.port, membership.timeout_seconds, membership.grace_seconds)
    except RuntimeError as error:
        raise CommandError(f"port {args.port} cannot be used: {error}; write another --port") from error
    print(f"export {LIGHTHOUSE}=http://{socket.getfqdn()}:{args.port}", flush=True)
    try:
        threading.Event().wait()
    finally:
        lighthouse.shutdown()
    return 0
