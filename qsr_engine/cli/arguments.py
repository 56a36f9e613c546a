"""Arguments that several sub-commands take."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    *,
    more: str = "",
    examples: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """A sub-command with a help that says in sentences what it does, and shows how it is called.

    Args:
        summary: one sentence; the list of all commands has it too.
        more: further sentences, for its own help.
        examples: lines as a user writes them, each with what it is for behind a #.
    """
    return commands.add_parser(
        name,
        help=summary[0].lower() + summary[1:].removesuffix("."),
        description=textwrap.fill(f"{summary} {more}", 79),
        epilog="\n  ".join(["examples:", *examples]) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def whole_number(text: str) -> int:
    """A type of argparse: from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; write a whole number from 1 on")
    return int(text)


def add_overrides(command: argparse.ArgumentParser) -> None:
    """`--set`, as `args.set`."""
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a key; repeatable"
    )


def overrides(args: argparse.Namespace) -> list[str]:
    """The same words for the command of a rank."""
    return [word for override in args.set for word in ("--set", override)]
