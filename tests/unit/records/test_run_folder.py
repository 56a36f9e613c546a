"""Which folder a new run may have, and who is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qsr_engine.config.strict import ConfigError
from qsr_engine.records.run_folder import check_run_folder, open_run_folder


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


def test_of_two_runs_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run_folder(tmp_path / "run", "first")
    # The second looked before it was made.
    monkeypatch.setattr("qsr_engine.records.run_folder.check_run_folder", lambda path: None)
    with pytest.raises(ConfigError, match="File exists"):
        open_run_folder(tmp_path / "run", "second")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == "first"
