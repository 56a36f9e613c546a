"""The frontier of `make demo` on ranks: one run after another in the same processes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.pool import Processes


def frontier_job(results: str, steps: int) -> None:
    import torch.distributed as dist

    from benchmarks.demo import frontier

    dist.init_process_group("gloo")
    before, frontier.STEPS = frontier.STEPS, steps
    try:
        settings = [frontier.Setting.constant(8, 0.03), frontier.Setting.qsr(4, 1.5, 0.03)]
        frontier._train_all(settings, [0, 1], Path(results), split=0)
    finally:
        frontier.STEPS = before


def test_every_setting_is_trained_with_every_seed(processes: Processes, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    processes.run(frontier_job, results=str(results), steps=80)
    rows = json.loads(results.read_text())
    assert [(row["name"], row["seed"]) for row in rows] == [
        (name, seed) for seed in (0, 1) for name in ("constant H = 8", "QSR h_base 4, alpha = 1.5 peak")
    ]
    assert len({row["accuracy"] for row in rows}) > 1
    assert min(row["accuracy"] for row in rows) > 50, "it learns: chance is 10 %"
    percents = [row["averagings_percent"] for row in rows]
    assert percents[::2] == [12.5, 12.5]
    assert percents[1] == percents[3] == 20.0, "H grows above 4"
