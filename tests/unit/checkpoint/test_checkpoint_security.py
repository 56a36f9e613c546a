"""Manifests that nobody here has written: each is read or refused, and nothing outside its folder is looked at."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qsr_engine.checkpoint.find import find_alone
from qsr_engine.checkpoint.manifest import CheckpointError, Manifest, digest_of, sha256
from qsr_engine.checkpoint.model_file import export

SHA = "0" * 64
ENTRIES: list[Any] = [[-1, SHA], [2**63, SHA], [True, SHA], [1.5, SHA], ["5", SHA], [5, "x"], [5], 5, None, {}]
RANKS: list[Any] = [[-1], ["0"], [True], {}, [[0]]]


def made(folder: Path, tag: str = "tag", saved_at: float = 1.0) -> Path:
    """A whole checkpoint with one file."""
    (folder / tag).mkdir(parents=True)
    (folder / tag / "model.safetensors").write_bytes(b"model")
    files = {"model.safetensors": (5, sha256(folder / tag / "model.safetensors"))}
    Manifest(tag, 4, saved_at, {"workers": 2}, {"a": 1}, [0, 1], files).write(folder / tag)
    return folder / tag


def forge(folder: Path, **changed: Any) -> None:
    """Change entries of a manifest, with a digest that fits them."""
    body = {**json.loads((folder / "manifest.json").read_text()), **changed}
    body.pop("sha256_of_the_rest")
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256_of_the_rest": digest_of(body)}))


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"in": value}
    return value


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        *(
            ({"files": {name: [5, SHA]}}, "is no name of a file inside the checkpoint")
            for name in (
                "../outside",
                "/etc/passwd",
                "a/../../outside",
                "worker-00000\\rank-00000.pt",
                "a//b",
                "./a",
                "",
                "a\0b",
                "a\nb",
                "\ud800",
                "..",
            )
        ),
        *(({"files": {"a": entry}}, "for the file 'a' it has no size and SHA-256") for entry in ENTRIES),
        *(({"step": step}, "of a wrong type: step") for step in (-1, 2**63, 1.0, True, "4", None)),
        *(({"ranks": ranks}, "of a wrong type: ranks") for ranks in RANKS),
        *(({"saved_at": at}, "saved_at") for at in (1, "now", None)),
        *(({"saved_at": at}, "is no number of JSON") for at in (float("inf"), float("nan"))),
        ({"layout": nested(64)}, "blocks are inside one another"),
        ({"config": nested(900)}, "blocks are inside one another|cannot be read"),
        ({"more": 1}, "unknown keys"),
        ({"format": 10**400}, "the format is 1000"),
        ({"tag": 5}, "tag"),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    (tmp_path / "outside").write_bytes(b"12345")
    folder = made(tmp_path / "run")
    forge(folder, **changed)
    with pytest.raises(CheckpointError) as error:
        Manifest.read(folder)
    assert any(part in str(error.value) for part in words.split("|"))
    assert len(str(error.value)) < 1000
    with pytest.raises(CheckpointError):
        find_alone(tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 10_000,
        b'{"format": 1, "step": ' + b"9" * 5_000 + b"}",
        b'{"format": 1, "saved_at": 1e999}',
        b'{"format": 1, "saved_at": -Infinity}',
    ],
)
def test_any_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = made(tmp_path)
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        Manifest.read(folder)


def test_a_manifest_that_is_no_file_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(CheckpointError, match="it is no plain file"):
        Manifest.read(folder)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(CheckpointError, match="it is no plain file"):
        Manifest.read(folder)
    monkeypatch.setattr("qsr_engine.checkpoint.manifest._MOST_BYTES", 10)
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, and no manifest has more than 10"):
        Manifest.read(made(tmp_path / "long"))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Keys that are numbers, and numbers that are not finite, used to give a manifest that nobody could read."""
    config: dict[Any, Any] = {2: "two", 10: "ten", "limit": float("inf"), "path": Path("x")}
    Manifest("tag", 4, 1.0, {"workers": 2}, config, [0], {}).write(tmp_path)
    assert Manifest.read(tmp_path).config == {"2": "two", "10": "ten", "limit": "Infinity", "path": "x"}
    with pytest.raises(CheckpointError, match="blocks are inside one another"):
        Manifest("tag", 4, 1.0, {}, nested(70), [0], {}).write(tmp_path)
    assert Manifest.read(tmp_path).step == 4, "and is as it was"


@pytest.mark.parametrize(
    ("replace", "words"),
    [
        (lambda path, target: path.symlink_to(target), "model.safetensors is a symbolic link"),
        (lambda path, target: path.mkdir(), "model.safetensors is missing"),
        (lambda path, target: os.mkfifo(path), "model.safetensors is missing"),
    ],
)
def test_files_are_plain_files_of_the_folder(tmp_path: Path, replace: Callable[[Path, Path], None], words: str) -> None:
    folder = made(tmp_path / "run")
    (folder / "model.safetensors").rename(tmp_path / "model")
    replace(folder / "model.safetensors", tmp_path / "model")
    for action in (lambda: find_alone(folder), lambda: export(tmp_path / "run", tmp_path / "out")):
        with pytest.raises(CheckpointError, match=words):
            action()
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_link_inside_a_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (folder / "worker-00000").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="worker-00000 is a symbolic link"):
        find_alone(folder)


def test_a_checkpoint_that_is_a_link_is_taken_by_its_name_only(tmp_path: Path) -> None:
    made(tmp_path / "elsewhere", saved_at=9.0)
    made(tmp_path / "run", "plain", saved_at=1.0)
    (tmp_path / "run" / "best").symlink_to(tmp_path / "elsewhere" / "tag")
    assert find_alone(tmp_path / "run")[0].name == "plain"
    assert find_alone(tmp_path / "run" / "best")[1].tag == "tag"


def test_every_tensorboard_command_is_for_this_machine_alone() -> None:
    """TensorBoard has no password; without --host some versions listen on all interfaces."""
    root = Path(__file__).parents[3]
    texts = [
        path
        for pattern in ("*.md", "Makefile", "qsr_engine/**/*.py", "launch/*", "configs/**/*", "benchmarks/**/*.py")
        for path in root.glob(pattern)
        if path.is_file()
    ]
    commands = [line for path in texts for line in path.read_text(errors="replace").splitlines() if "--logdir" in line]
    assert commands, "there is one in the Makefile"
    assert all("--host localhost" in line and "bind_all" not in line for line in commands), commands
