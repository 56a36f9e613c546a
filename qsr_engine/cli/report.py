"""`qsr report`: a table, pictures and a page of runs."""

from __future__ import annotations

import argparse

from qsr_engine.cli.arguments import add_command
from qsr_engine.records.report import report


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = add_command(
        commands,
        "report",
        "Compare runs in a table, in pictures, and in one page, report.html.",
        more="Runs may be unfinished, and of earlier versions.",
        examples=[
            "qsr report runs                              # all runs in a folder",
            "qsr report runs/qsr runs/parallel --out out  # these two",
        ],
    )
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs")
    command.add_argument("--out", help="folder of the pictures and the page (default: `report` beside the first run)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; the page and its pictures are beside it."""
    print(report(args.runs, args.out))
    return 0
