"""Arguments that several sub-commands take."""

from __future__ import annotations

import argparse


def whole_number(text: str) -> int:
    """A type of argparse: from 1 on."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def add_overrides(command: argparse.ArgumentParser) -> None:
    """`--set`, as `args.set`."""
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a key; repeatable"
    )


def overrides(args: argparse.Namespace) -> list[str]:
    """The same words for the command of a rank."""
    return [word for override in args.set for word in ("--set", override)]
