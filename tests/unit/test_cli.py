"""The `qsr` command where it starts no training: shards, and how errors end it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qsr_engine.cli import main


def test_digits_are_written_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "digits")
    assert main(["shards", "digits", folder]) == 0
    assert main(["shards", "verify", folder]) == 0
    assert capsys.readouterr().out == 2 * (
        f"{folder}: split 'train', 1437 samples in 12 shards\n{folder}: split 'val', 360 samples in 3 shards\n"
    )


def test_a_rotten_shard_is_found(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "rotten"
    shutil.copytree(digits, folder)
    shard = folder / "val-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert main(["shards", "verify", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("qsr: error: ")
    assert "val-000001.tar" in said


def test_an_index_is_made_for_shards_of_others(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "found"
    shutil.copytree(digits, folder)
    (folder / "index.json").unlink()
    assert main(["shards", "verify", str(folder)]) == 2
    assert f"`qsr shards index {folder}` makes it" in capsys.readouterr().err
    assert main(["shards", "index", str(folder)]) == 0
    assert main(["shards", "verify", str(folder)]) == 0


@pytest.mark.parametrize("argv", [[], ["trian"], ["train"], ["train", "x", "--ranks", "0"], ["shards"]])
def test_wrong_commands_end_with_argparses_code(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)


def test_a_missing_recipe_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read this recipe" in capsys.readouterr().err
