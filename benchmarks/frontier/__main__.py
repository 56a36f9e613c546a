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
each of the shares; its peak rate is tuned for each share by itself, on 8 other trials (of regressions 30), by factors
of 2 until the best is not the smallest or largest tried. Errors are on the pictures that a trial did not draw, with
their true labels.

What has run is kept in FOLDER, line by line: stop it at any time, and run it again to go on. --seconds ends a process
early; --kept trains nothing, and reports what is there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.frontier.cases import PARTS, Case
from benchmarks.frontier.rules import RULES
from benchmarks.frontier.statements import foretold, statements, table
from benchmarks.frontier.study import Runs, run_all
from benchmarks.report import Report, parser


def in_words(cases: Sequence[Case]) -> str:
    """Each problem with its rules and budgets."""
    parts = []
    for title in dict.fromkeys(case.title for case in cases):
        rules = [f"{case.rule} at {100 * case.share:g} %" for case in cases if case.title == title]
        parts.append(f"{title} ({', '.join(rules)})")
    return "; ".join(parts)


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--runs", type=Path, required=True, metavar="FOLDER", help="of the raw outcomes; made if not there"
    )
    made.add_argument("--part", nargs="+", choices=list(PARTS), default=["main"])
    made.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10 as train/CLASS/*.jpg, for `pictures`")
    made.add_argument("--seconds", type=float, default=1e9, help="of one core, after which it ends, to be run again")
    made.add_argument("--kept", action="store_true", help="train nothing: report what is there, and what is not")
    arguments = made.parse_args()
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    runs = Runs(arguments.runs / "frontier.jsonl", arguments.data, trains=not arguments.kept)
    found, missing = {}, []
    for part in arguments.part:
        cases = PARTS[part]()
        if arguments.kept:
            missing += [case for case in cases if not runs.has(case)]
            cases = [case for case in cases if case not in missing]
        rows = run_all(runs, cases, arguments.seconds)
        if rows is None:
            sys.exit(f"{runs.seconds:.0f} s of one core so far; run it again to go on")
        found[part] = rows
    kept = Report("frontier", arguments, ("torch", "scikit-learn"), rules=list(RULES))
    kept.add(f"One core, {runs.seconds:.0f} s in all. ± is half the width of a 95 % interval over the trials.")
    kept.add(
        "Errors: per cent of test pictures; `sparse` and `sensing`: squared errors, 3 and 9 where nothing is learned."
    )
    if missing:
        kept.add(f"Not run: {in_words(missing)}.")
    predicted = [row for part, rows in found.items() if part != "main" for row in rows]
    if predicted:
        kept.add(f"## Predicted and found\n\n{foretold(predicted)}")
    for part, rows in found.items():
        kept.add(f"## {part}\n\n{table(rows)}")
    for part, rows in found.items():
        kept.add(f"## Pairs: {part}\n\n{statements(rows)}")
    kept.save(rows=found)


if __name__ == "__main__":
    main()
