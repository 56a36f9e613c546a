"""What may be said: means with 95 % intervals, and differences of two rules trial by trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.frontier.predictions import PREDICTED
from benchmarks.intervals import Interval, interval

Row = dict[str, Any]


def difference(one: Row, other: Row, among: int = 1) -> Interval:
    """Of the errors, trial by trial: one - other, with half the width of its interval, as `interval` has it."""
    return interval([a - b for a, b in zip(one["errors"], other["errors"], strict=True)], among)


def with_interval(values: tuple[float, float], sign: bool = False, digits: int = 2) -> str:
    return f"{values[0]:{'+' if sign else ''}.{digits}f} ± {values[1]:.{digits}f}"


def digits_of(row: Row) -> int:
    """After the point: squared errors of regressions are small."""
    return 2 if row.get("unit", "points") == "points" else 3


def verdict(one: Row, other: Row, among: int = 1) -> str:
    """In words, of two rules at the same budget; among: the pairs that are looked at with this one."""
    gap, half = difference(one, other)
    digits = digits_of(one)
    if abs(gap) <= half:
        words = with_interval((gap, half), sign=True, digits=digits)
        return f"{one['rule']} and {other['rule']} cannot be told apart ({words})"
    first, second = (one, other) if gap < 0 else (other, one)
    unit = " points" if digits == 2 else ""
    holds = ", all pairs considered" if among > 1 and abs(gap) > difference(one, other, among)[1] else ""
    words = with_interval((abs(gap), half), digits=digits)
    return f"{first['rule']} errs less than {second['rule']} by {words}{unit}{holds}"


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    return [(one, other) for number, one in enumerate(rows) for other in rows[number + 1 :]]


def by_problem(rows: Sequence[Row]) -> list[tuple[str, Row, list[Row]]]:
    """Name, parallel's row, and the other rows of every problem."""
    found = []
    for name in dict.fromkeys(row["problem"] for row in rows):
        own = [row for row in rows if row["problem"] == name]
        parallel = next(row for row in own if row["rule"] == "parallel")  # always the first that runs
        found.append((name, parallel, [row for row in own if row is not parallel]))
    return found


def at(rows: Sequence[Row], rule: str, budget: float) -> Row | None:
    return next((row for row in rows if row["rule"] == rule and row["budget"] == budget), None)


def table(rows: Sequence[Row]) -> str:
    """A line a rule and budget; the last columns are differences to parallel and to constant H at the same budget."""
    lines = []
    for name, parallel, others in by_problem(rows):
        for row in [parallel, *others]:
            digits = digits_of(row)
            gaps = [
                "" if other is None or other is row else with_interval(difference(row, other), sign=True, digits=digits)
                for other in (parallel, at(others, "constant", row["budget"]))
            ]
            rate = f"{row['rate']:g}{' (edge)' if row['edge'] else ''}"
            error = with_interval(interval(row["errors"]), digits=digits)
            figures = [f"{row['averagings_percent']:.3g}", str(row["period_at_peak"]), str(row["longest_round"]), rate]
            lines.append([name, row["rule"], *figures, error, *gaps])
    columns = ["averagings %", "H at peak", "longest round", "peak rate", "error", "to parallel", "to constant"]
    return report.table(["problem", "rule", *columns], lines)


def foretold(rows: Sequence[Row]) -> str:
    """A line a problem and budget with what was predicted, and the differences that it speaks of."""
    lines = []
    for name, parallel, others in by_problem(rows):
        said = PREDICTED.get(name) or (PREDICTED["fixed rate"] if name.endswith("times the rate") else "")
        for budget in dict.fromkeys(row["budget"] for row in others):
            constant, qsr = (at(others, rule, budget) for rule in ("constant", "QSR"))
            couples = ((constant, parallel), (qsr, parallel), (qsr, constant))
            found = [
                "" if one is None or two is None else with_interval(difference(one, two), True, digits_of(parallel))
                for one, two in couples
            ]
            lines.append([name, f"{100 * budget:g}", said, *found])
    columns = ["predicted", "constant - parallel", "QSR - parallel", "QSR - constant"]
    return report.table(["problem", "averagings %", *columns], lines)


def statements(rows: Sequence[Row]) -> str:
    """Every pair of rules at the same budget, and every rule beside parallel."""
    groups = []
    for name, parallel, others in by_problem(rows):
        for budget in dict.fromkeys(row["budget"] for row in others):
            own = [row for row in others if row["budget"] == budget]
            couples = [*pairs(own), *((row, parallel) for row in own)]
            groups.append((f"**{name}, at most {100 * budget:g} % of the steps**\n", couples))
    count = sum(len(couples) for _, couples in groups)
    parts = [
        f"{count} pairs; of pairs that do not differ one in twenty would be told apart. Where it says `all pairs "
        "considered`, the difference holds at a level of 5 % for all of these together (Bonferroni).\n"
    ]
    for head, couples in groups:
        parts += [head, *(f"- {verdict(one, other, count)}." for one, other in couples), ""]
    return "\n".join(parts)
