"""The README's example runs as it stands there."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from tests.support.pool import Processes

README = Path(__file__).parents[2] / "README.md"


def example_job(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue()


def test_the_readmes_example_takes_local_steps(processes: Processes) -> None:
    code, _, _ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    first, second = processes.run(example_job, code=code)
    assert second == ""
    lines = first.splitlines()
    assert lines[0].startswith("step 4, averaged 1 times, loss ")
    assert lines[-1].startswith("step 400, ")
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert losses[-1] < losses[0] / 4


def test_the_example_on_fsdp_takes_local_steps(processes: Processes) -> None:
    _, code, _ = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for said in processes.run(example_job, code=code):
        averaged = re.fullmatch(r"averaged (\d+) times in 12 steps\n", said)
        assert averaged
        assert 1 < int(averaged[1]) < 6
