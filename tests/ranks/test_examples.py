"""The examples of docs/ run as they stand there. tests/unit/test_docs.py has what is read and not run."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from tests.support.pool import Processes

DOCS = Path(__file__).parents[2] / "docs"


def example(page: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    return str(code)


def example_job(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue()


def test_the_example_on_deepspeed_takes_local_steps(processes: Processes) -> None:
    first, second = processes.run(example_job, code=example("deepspeed.md"))
    assert second == ""
    lines = first.splitlines()
    assert lines[0].startswith("step 4, averaged 1 times, loss ")
    assert lines[-1].startswith("step 400, ")
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert losses[-1] < losses[0] / 4


def test_the_example_on_fsdp_takes_local_steps(processes: Processes) -> None:
    for said in processes.run(example_job, code=example("fsdp.md")):
        averaged = re.fullmatch(r"averaged (\d+) times in 12 steps\n", said)
        assert averaged
        assert 1 < int(averaged[1]) < 6
