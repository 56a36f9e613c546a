"""Test error over averagings, for every rule over a grid of its constant: when does QSR win, and when not?

    python -m benchmarks.frontier --runs FOLDER                       # digits, 16,000 steps, every rule
    python -m benchmarks.frontier --runs FOLDER --part varied         # what theory says matters, one at a time
    python -m benchmarks.frontier --runs FOLDER --part fixed          # at rates that are too large
    python -m benchmarks.frontier --runs FOLDER --part regressions    # where only the drift along minimizers learns
    python -m benchmarks.frontier --runs FOLDER --part pictures --data CIFAR10_FOLDER

K workers and 30 trials are the rows of one tensor in one process, on one core; the position, the schedule, the rule and
the outer step are the package's own (`Rounds`, `Outer`), and the mean is the sum over workers divided once, as its
all-reduce has it. A trial is a draw of training pictures, a start and batches, the same under every rule.

Every rule gets the smallest period at the peak rate with which it averages in no more than a share of the steps, for
each of the shares; its peak rate is tuned for each share by itself, on 8 other trials, by factors of 2 until the best
is not the smallest or largest tried. Errors are on the pictures that a trial did not draw, with their true labels.

What has run is kept in FOLDER, line by line: stop it at any time, and run it again to go on. --seconds ends a process
early.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.frontier.cases import PARTS
from benchmarks.frontier.rules import RULES
from benchmarks.frontier.statements import Row, difference, pairs, verdict, with_interval
from benchmarks.frontier.study import Runs, run_all
from benchmarks.intervals import interval
from benchmarks.report import Report, parser


def table(rows: Sequence[Row]) -> str:
    """A line a rule and budget; the last columns are differences to parallel and to constant H at the same budget."""
    lines = []
    for row in rows:
        own = [one for one in rows if one["problem"] == row["problem"]]
        parallel = next(one for one in own if one["rule"] == "parallel")
        constant = next((one for one in own if one["rule"] == "constant" and one["budget"] == row["budget"]), None)
        gaps = [
            "" if other is None or other is row else with_interval(difference(row, other), sign=True)
            for other in (parallel, constant)
        ]
        rate = f"{row['rate']:g}{' (edge)' if row['edge'] else ''}"
        figures = [f"{row['averagings_percent']:.2f}", str(row["period_at_peak"]), str(row["longest_round"]), rate]
        lines.append([row["problem"], row["rule"], *figures, with_interval(interval(row["errors"])), *gaps])
    columns = ["averagings %", "H at peak", "longest round", "peak rate", "error %", "to parallel", "to constant"]
    return report.table(["problem", "rule", *columns], lines)


def statements(rows: Sequence[Row]) -> str:
    """Every pair of rules at the same budget, and every rule beside parallel."""
    parts, count = [], 0
    for problem in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in rows if row["problem"] == problem]
        parallel = next(row for row in own if row["rule"] == "parallel")
        for budget in dict.fromkeys(row["budget"] for row in own if row is not parallel):
            at = [row for row in own if row["budget"] == budget and row is not parallel]
            lines = [verdict(*pair) for pair in [*pairs(at), *((row, parallel) for row in at)]]
            count += len(lines)
            parts.append(f"**{problem}, at most {100 * budget:g} % of the steps**\n")
            parts += [f"- {line}." for line in lines]
            parts.append("")
    return f"{count} pairs; of pairs that do not differ one in twenty would be told apart.\n\n" + "\n".join(parts)


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--runs", type=Path, required=True, metavar="FOLDER", help="of the raw outcomes; made if not there"
    )
    made.add_argument("--part", nargs="+", choices=list(PARTS), default=["main"])
    made.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10 as train/CLASS/*.jpg, for `pictures`")
    made.add_argument("--seconds", type=float, default=1e9, help="of one core, after which it ends, to be run again")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    runs = Runs(arguments.runs / "frontier.jsonl", arguments.data)
    found = {}
    for part in arguments.part:
        rows = run_all(runs, PARTS[part](), arguments.seconds)
        if rows is None:
            sys.exit(f"{runs.seconds:.0f} s of one core so far; run it again to go on")
        found[part] = rows
    kept = Report("frontier", arguments, ("torch", "scikit-learn"), rules=list(RULES))
    kept.add(f"One core, {runs.seconds:.0f} s in all. ± is half the width of a 95 % interval over the trials.")
    for part, rows in found.items():
        kept.add(f"## {part}\n\n{table(rows)}")
    for part, rows in found.items():
        kept.add(f"## Pairs: {part}\n\n{statements(rows)}")
    kept.save(rows=found)


if __name__ == "__main__":
    main()
