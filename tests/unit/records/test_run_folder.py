"""Which folder a new run may have, and who is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qsr_engine.config.strict import ConfigError
from qsr_engine.records.run_folder import (
    check_run_folder,
    check_unfinished,
    is_finished,
    leave_unfinished_run,
    open_run_folder,
)


def test_a_new_folder_gets_the_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "digits"
    check_run_folder(folder)
    assert not folder.parent.exists()
    open_run_folder(folder, "seed: 0\n")
    assert (folder / "recipe.yaml").read_text() == "seed: 0\n"
    (tmp_path / "empty").mkdir()
    open_run_folder(tmp_path / "empty", "seed: 1\n")


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "events.out.tfevents.1.host", "notes.txt"])
def test_a_folder_that_holds_anything_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("kept")
    refusals: list[Callable[[], None]] = [lambda: check_run_folder(tmp_path), lambda: open_run_folder(tmp_path, "")]
    for refuse in refusals:
        with pytest.raises(ConfigError) as error:
            refuse()
        for part in (str(tmp_path), name, "--set logging.name=NAME", "delete the folder"):
            assert part in str(error.value)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "kept")]


def test_a_place_where_no_folder_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, reason in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "run", "is a file"),
        (tmp_path / ("x" * 300), "name too long"),
    ]:
        with pytest.raises(ConfigError, match=f"(?i){reason}") as error:
            open_run_folder(path, "")
        assert "--set logging.dir=DIR" in str(error.value)


def test_a_place_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root, who runs CI, may write anywhere
    with pytest.raises(ConfigError, match="no permission"):
        open_run_folder(tmp_path / "run", "")


@pytest.mark.parametrize(
    ("summary", "finished_for", "words"),
    [
        (None, [], None),
        ('{"steps": 8, "partial": true}', [5, 8], "stopped at step 8, and stop_at_step is 8; to go on, write a later"),
        ('{"steps": 8, "partial": false}', [5, 8, 9], "is finished"),
        ('{"steps": 8}', [5, 8, 9], "is finished"),  # of an older version
        ("{", [5, 8, 9], "is finished"),
    ],
)
def test_a_run_that_has_stopped_goes_on_to_a_later_step(
    tmp_path: Path, summary: str | None, finished_for: list[int], words: str | None
) -> None:
    if summary is not None:
        (tmp_path / "summary.json").write_text(summary)
    assert [step for step in (5, 8, 9) if is_finished(tmp_path, step)] == finished_for
    check_unfinished(tmp_path, 9) if 9 not in finished_for else None
    if words is not None:
        with pytest.raises(ConfigError, match=words):
            check_unfinished(tmp_path, 8)


def test_what_an_attempt_without_a_checkpoint_recorded_is_kept_aside(tmp_path: Path) -> None:
    """Twice in a second too; what says nothing is deleted, and what is nobody's refused."""
    for attempt in range(2):
        open_run_folder(tmp_path, f"seed: {attempt}\n")
        for name in ("metrics.jsonl", "events.out.tfevents.1.host", "model.tmp", ".lock"):
            (tmp_path / name).write_text(f"{name} {attempt}")
        (tmp_path / "workers.jsonl").touch()
        (tmp_path / "checkpoints" / ".step-4.tmp").mkdir(parents=True)
        with pytest.warns(UserWarning, match="no checkpoint to go on from, .* had recorded is in .*/before-"):
            leave_unfinished_run(tmp_path)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 2
    for attempt, folder in enumerate(kept):
        assert sorted(path.name for path in folder.iterdir()) == [
            "events.out.tfevents.1.host",
            "metrics.jsonl",
            "recipe.yaml",
            "workers.jsonl",
        ]
        assert (folder / "metrics.jsonl").read_text() == f"metrics.jsonl {attempt}"
        assert (folder / "recipe.yaml").read_text() == f"seed: {attempt}\n"
    open_run_folder(tmp_path, "seed: 2\n")
    (tmp_path / "metrics.jsonl").touch()
    leave_unfinished_run(tmp_path)
    assert sorted(tmp_path.iterdir()) == kept, "nothing was recorded"
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"holds notes\.txt, which no run writes"):
        leave_unfinished_run(tmp_path)


def test_of_two_runs_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run_folder(tmp_path / "run", "first")
    # The second looked before it was made.
    monkeypatch.setattr("qsr_engine.records.run_folder.check_run_folder", lambda path: None)
    with pytest.raises(ConfigError, match="File exists"):
        open_run_folder(tmp_path / "run", "second")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "first"
