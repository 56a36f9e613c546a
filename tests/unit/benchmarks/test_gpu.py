"""`make test-gpu`, rehearsed without a GPU: its table, its JSON, and that nothing which was skipped passes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch.distributed as dist

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import commands, two_ranks
from benchmarks.gpu.rows import FAILED, NOT_RUN, Row, checked, exit_code, not_run, shown
from tests.support.pool import free_port, rank_environment

REPORT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_engine_on_gpu" name="test_every_stage[0]" time="1.5"/>
<testcase classname="tests.gpu.test_engine_on_gpu" name="test_every_stage[1]" time="2">
<failure message="no"/></testcase>
<testcase classname="tests.gpu.test_data_on_gpu" name="test_it" time="0"><skipped message="needs a GPU"/></testcase>
<testcase classname="" name="tests.gpu.test_fsdp_on_gpu" time="0"><error message="no timm"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def _one_rank_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ranks are this process, which has imported everything."""
    for name, value in rank_environment(0, 1, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("benchmarks.ranks.run", lambda function, *arguments, **_: function(*arguments))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank_here")
def test_the_rehearsal_says_what_was_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--parts", "boundary", "loader", "--mb", "0.4", "--batches", "1"]
    assert gpu.main([*words, "--out", str(tmp_path)]) == NOT_RUN
    printed = capsys.readouterr().out
    rows = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))["rows"]
    assert {row["state"] for row in rows} == {"ok", "not run"}
    for row in rows:
        assert f"| {row['part']} | {row['check']} | {row['state']} |" in printed
        assert row["state"] == "ok" or row["found"] in ("needs CUDA", "left out by --parts")
    good = {row["check"]: row["figures"] for row in rows if row["state"] == "ok"}
    assert set(good["waits of the host"]["calls"]) == {1}
    assert good["time, in place"]["ratio"] > 0
    (kept,) = tmp_path.glob("gpu-*.json")
    assert json.loads(kept.read_text())["rows"] == rows


def test_nothing_passes_that_was_not_run() -> None:
    good, bad = Row("a", "b", "ok"), Row("a", "d", "failed")
    skipped = not_run("a", ["c"], "needs CUDA")
    assert [exit_code(rows) for rows in ([good], [good, *skipped], [good, bad, *skipped], [])] == [
        0,
        NOT_RUN,
        FAILED,
        NOT_RUN,
    ]
    assert "1 ok, 0 failed, 1 not run. So this run has failed." in shown([good, *skipped])

    def breaks() -> tuple[bool, str, dict[str, object]]:
        raise ValueError("what | went\nwrong")

    row = checked("a", "b", breaks)
    assert (row.state, "ValueError: what / went wrong" in shown([row])) == ("failed", True)


def test_what_does_not_come_to_its_turn_was_not_run() -> None:
    rows = gpu.run(gpu.parse(["--device", "cpu", "--seconds", "0"]))
    assert [(row.part, row.found) for row in rows] == [(part, "no time was left") for part in gpu.PARTS]


def test_a_report_of_pytest() -> None:
    rows = {row.check: row for row in commands.rows_of(ElementTree.fromstring(REPORT))}
    failed, skipped, missing = rows["engine: every stage"], rows["data: it"], rows["tests.gpu.test_fsdp_on_gpu"]
    assert (failed.state, failed.found, failed.seconds) == ("failed", "test_every_stage[1]: no", 3.5)
    assert (skipped.state, missing.state) == ("not run", "failed")


def test_every_way_is_in_one_of_the_jobs() -> None:
    for engine in two_ranks.ENGINES:
        assert len(two_ranks.names(engine, 2)) + len(two_ranks.names(engine, 4)) == len(two_ranks.CASES)
