"""Every combination of ZeRO stage, precision and optimizer: it equals the reference, or it is refused.

The table in docs/deepspeed.md is made from COMBINATIONS, and every cell of it is a test here. To write it anew:

    python -m tests.ranks.test_combinations
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qsr_engine.config.deepspeed import check_supported
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError, validate
from tests.support import training
from tests.support.combinations import (
    COMBINATIONS,
    NO_COMPILER,
    PRECISIONS,
    STAGES,
    Combination,
    assert_like_reference,
    expected,
    train_job,
)
from tests.support.pool import Processes

PAGE = Path(__file__).parents[2] / "docs" / "deepspeed.md"


# Optimizers alternate between the sizes: what differs between optimizers does not differ between sizes as well.
WORKER_SIZES = {"AdamW": 1, "SGD": 2, "FusedAdam": 1, "offloaded CPUAdam": 2, "offloaded SGD": 1}


def shown(combination: Combination) -> bool:
    """Torch's AdamW and SGD in every cell; what differs only in the optimizer's class, once a stage."""
    return combination.optimizer in ("AdamW", "SGD") or PRECISIONS.index(combination.precision) == combination.stage


def cell(combination: Combination) -> Any:
    marks = [pytest.mark.slow, pytest.mark.compiled] if combination.compiled else []
    return pytest.param(
        combination, marks=marks, id=f"{combination.stage}-{combination.precision}-{combination.optimizer}"
    )


@pytest.mark.fast_cells(7, of=18)
@pytest.mark.parametrize("combination", [cell(c) for c in COMBINATIONS if not c.refused and shown(c)])
def test_combination(processes: Processes, combination: Combination) -> None:
    """Two workers over five rounds of 2, 2, 2, 2 and 4 steps equal the reference, and are silent between boundaries."""
    if combination.compiled and NO_COMPILER:
        pytest.skip("DeepSpeed compiles this optimizer, and there is no C++ compiler here")
    worker_size = WORKER_SIZES[combination.optimizer]
    qsr = {**training.QSR, "worker_size": worker_size}
    job: dict[str, Any] = {"combination": combination, "qsr": qsr, "config": {}}
    results = processes.run(train_job, ranks=2 * worker_size, seconds=400, **job)  # an operator may be compiled first
    assert_like_reference(combination, results, expected(combination, qsr, workers=2))
    for result in results:
        assert result["ends"] == [2, 4, 6, 8, 12]
        assert [count for boundary, count in result["counts"] if not boundary] == [0] * 7
        assert all(count >= 2 for boundary, count in result["counts"] if boundary)


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c.refused], ids=str)
def test_a_combination_that_is_refused(combination: Combination) -> None:
    """By its configuration alone, before anything starts."""
    with pytest.raises(ConfigError, match=combination.refused):
        check_supported(combination.config(), validate(QSRConfig, training.QSR, where="test"))


# ---------------------------------------------------------------------------------------- the page's table

BEGIN, END = "<!-- combinations -->", "<!-- end of combinations -->"


def table() -> str:
    lines = [f"| ZeRO stage | {' | '.join(PRECISIONS)} |", "| --- |" + " --- |" * len(PRECISIONS)]
    for stage in STAGES:
        cells = []
        for precision in PRECISIONS:
            here = [c for c in COMBINATIONS if (c.stage, c.precision) == (stage, precision)]
            works = [c.optimizer for c in here if not c.refused]
            text = "works" if len(works) == len(here) else f"works: {', '.join(works)}" if works else "refused"
            refused = [c.optimizer for c in here if c.refused and works]
            cells.append(text + (f"; refused: {', '.join(refused)}" if refused else ""))
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


def test_the_page_has_this_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert with_table(text) == text, "write it anew: python -m tests.ranks.test_combinations"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
