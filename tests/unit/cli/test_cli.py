"""The `qsr` command where it starts no training: shards, and how errors end it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsr_engine.cli.launched import started_by_a_launcher
from qsr_engine.cli.main import main
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import Index
from qsr_engine.records.run_folder import open_run_folder
from tests.support.shard_files import write_images, write_tar


@pytest.mark.parametrize(
    ("words", "extra", "package"),
    [
        (["shards", "digits", "out"], "demo", "scikit-learn"),
        (["report", "run"], "report", "matplotlib"),
        (["plan", "recipe", "--plot", "plan.png"], "report", "matplotlib"),
    ],
)
def test_a_missing_extra_is_named(
    words: list[str],
    extra: str,
    package: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    if "run" in words:
        open_run_folder(tmp_path / "run", "qsr: {strategy: parallel, total_steps: 1}")
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert main(words) == 1
    said = capsys.readouterr().err
    assert f"needs {package}, which is not installed; write `pip install 'qsr-engine[{extra}]'`" in said
    assert {path.name for path in tmp_path.iterdir()} <= {"run"}


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
    assert main(["shards", "verify", str(folder)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("qsr: error: ")
    assert "val-000001.tar" in said


def test_an_index_is_made_for_shards_of_others(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "found"
    shutil.copytree(digits, folder)
    (folder / "index.json").unlink()
    assert main(["shards", "verify", str(folder)]) == 1
    assert f"`qsr shards index {folder}` makes it" in capsys.readouterr().err
    assert main(["shards", "index", str(folder)]) == 0
    assert main(["shards", "verify", str(folder)]) == 0


@contextmanager
def no_superuser() -> Iterator[None]:
    """Permissions hold for root too."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def opened() -> Iterator[Path]:
    """A folder that every user may write in, where pytest's own are root's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        write_tar(folder / "train-000000.tar", {"a.jpg": b"A", "a.cls": b"0"})
        write_images(folder, {"images/cat": 1})
        (folder / "inner").mkdir()
        yield folder
        for path in (folder, *folder.iterdir()):
            path.chmod(0o777)


@pytest.mark.parametrize(
    ("mode", "locked", "words", "message"),
    [
        (0o000, "train-000000.tar", ["index", ""], "train-000000.tar: this shard cannot be read"),
        (0o555, "", ["index", ""], "index.json: this index cannot be written"),
        (0o000, "inner", ["index", "inner"], "inner: this folder cannot be read"),
        (0o333, "inner", ["index", "inner"], "inner: this folder cannot be read"),
        (0o000, "inner", ["imagefolder", "inner/root", "out"], "inner/root: this cannot be read"),
        (0o000, "images", ["imagefolder", "images", "out"], "images/train: this cannot be read"),
        (0o333, "images", ["imagefolder", "images", "out"], "images: this cannot be read"),
        (0o333, "images/cat", ["imagefolder", "images", "out"], "images/cat: this cannot be read"),
        (0o000, "inner", ["imagefolder", "images", "inner/out"], "inner/out: this folder cannot be read"),
        (0o555, "inner", ["imagefolder", "images", "inner/out"], "inner/out: this folder cannot be made"),
        (0o333, "inner", ["imagefolder", "images", "inner"], "inner: this folder cannot be read"),
        (0o000, "inner", ["verify", "inner"], "inner/index.json: this index cannot be read"),
    ],
)
def test_what_may_not_be_read_or_written_is_one_line(
    opened: Path, mode: int, locked: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (opened / locked).chmod(mode)
    with no_superuser():
        assert main(["shards", words[0], *(str(opened / word) for word in words[1:])]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qsr: error: {opened / message}: Permission denied")
    assert said.count("\n") == 1


def test_files_that_nobody_foresaw_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: str, **__: object) -> Index:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "some/file")

    monkeypatch.setattr("qsr_engine.cli.shards.index_shards", fail)
    assert main(["shards", "index", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "qsr: error: some/file: Input/output error\n"


def test_a_folder_whose_name_is_not_utf8_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_tar(folder / "train-000000.tar", {"a.jpg": b"A", "a.cls": b"0"})
    assert main(["shards", "index", str(folder)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/caf\\xe9: split 'train', 1 samples in 1 shards\n"


@pytest.mark.parametrize("argv", [[], ["trian"], ["train"], ["train", "x", "--ranks", "0"], ["shards"]])
def test_wrong_commands_end_with_argparses_code(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)


def test_a_missing_recipe_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "cannot read this recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"RANK": "0"}, "no LOCAL_RANK, no WORLD_SIZE, no MASTER_PORT, no MASTER_ADDR"),
        ({"RANK": ""}, "RANK=, no LOCAL_RANK"),
        ({"RANK": "abc", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1", "MASTER_ADDR": "a"}, "RANK=abc"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1", "MASTER_ADDR": "a"}, "WORLD_SIZE=2"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1", "MASTER_ADDR": ""}, "MASTER_ADDR="),
    ],
)
def test_half_of_a_launchers_environment_is_refused(
    found: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not started_by_a_launcher()
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(words)):
        started_by_a_launcher()
