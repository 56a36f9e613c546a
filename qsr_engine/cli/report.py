"""`qsr report`: a table and plots of finished runs."""

from __future__ import annotations

import argparse

from qsr_engine.records.report import report


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = commands.add_parser("report", help="compare finished runs: a table and plots")
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs")
    command.add_argument("--out", help="folder of the plots (default: `report` beside the first run)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; the plots are beside it."""
    print(report(args.runs, args.out))
    return 0
