"""Writing shards in several processes: the plan, kills, and going on where a command stopped."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from qsr_engine.data import DataError, Index, index_shards, write_imagefolder
from qsr_engine.data.index import Shard
from qsr_engine.data.writing.resuming import RECORD_NAME, ShardSize
from qsr_engine.data.writing.shard import Written, sample_bytes, write_shard
from tests.support.shard_files import picture, read_folder, read_samples, write_images

ROOT = Path(__file__).parents[3]


def test_shards_end_before_they_have_more_bytes_than_asked(tmp_path: Path) -> None:
    (tmp_path / "images/cat").mkdir(parents=True)
    for number in range(40):
        padding = bytes(700 * (number % 7))  # after the end of a JPEG, where decoders don't look
        (tmp_path / f"images/cat/{number}.jpg").write_bytes(picture(8, 8, seed=number) + padding)
    limit = 30_000
    index = write_imagefolder(tmp_path / "images", tmp_path / "out", shard_bytes=limit)
    shards = index.splits["train"].shards
    taken = [
        sum(sample_bytes(len(s.image)) for s in read_samples(tmp_path / "out", one(shard), "train")) for shard in shards
    ]
    assert len(shards) > 3
    assert all(bytes_ <= limit for bytes_ in taken)
    largest = sample_bytes(max(path.stat().st_size for path in (tmp_path / "images/cat").iterdir()))
    assert all(bytes_ > limit - largest for bytes_ in taken[:-1])  # none ends before it must
    # What a tar file has besides its samples is its end, 1,024 bytes, filled up to a multiple of 10,240.
    assert [shard.bytes for shard in shards] == [-(-(bytes_ + 1024) // 10240) * 10240 for bytes_ in taken]


def one(shard: Shard) -> Index:
    return Index(classes=None, splits={"train": {"samples": shard.samples, "shards": [shard]}})  # type: ignore[dict-item]


def test_an_image_larger_than_a_shard_has_one_for_itself() -> None:
    parts = list(ShardSize(bytes=5000, samples=None).cut([9000, 100, 100, 9000, 100]))
    assert parts == [range(0, 1), range(1, 3), range(3, 4), range(4, 5)]
    assert list(ShardSize(bytes=None, samples=2).cut([1, 1, 1])) == [range(0, 2), range(2, 3)]
    assert list(ShardSize(bytes=5000, samples=None).cut([])) == []


def test_odd_file_names_and_links_are_images_as_others_are(tmp_path: Path) -> None:
    folder = tmp_path / "images/häuser und. mehr"
    folder.mkdir(parents=True)
    names = ["ein bild.tar.jpg", "日本.JPEG", ".hidden.jpg", "a..jpg", "x.Png"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(8, 8, seed=number))
    (folder / os.fsdecode(b"latin-\xe9.jpg")).write_bytes(picture(8, 8, seed=5))
    (tmp_path / "elsewhere.bin").write_bytes(picture(8, 8, seed=6))
    (folder / "link.jpg").symlink_to(tmp_path / "elsewhere.bin")
    index = write_imagefolder(tmp_path / "images", tmp_path / "out")
    assert index.classes == ["häuser und. mehr"]
    assert {sample.image for sample in read_samples(tmp_path / "out", index, "train")} == {
        picture(8, 8, seed=number) for number in (0, 1, 3, 4, 5, 6)
    }
    (folder / "broken.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"broken\.jpg: this image cannot be read: No such file"):
        write_imagefolder(tmp_path / "images", tmp_path / "other")


def test_a_class_name_that_no_json_can_hold_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, {os.fsdecode(b"caf\xe9"): 1})
    with pytest.raises(DataError, match=r"the class name b'caf\\xe9' is not UTF-8"):
        write_imagefolder(tmp_path, tmp_path.with_name("out"), split="train")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 90}, "write max_side or short_side with it"),
        ({"max_side": 9, "short_side": 9}, r"both max_side \(9\) and short_side \(9\) are given"),
        ({"max_side": 9, "quality": 101}, "quality is 101; write a number from 1 to 100"),
        ({"short_side": 0}, "short_side is 0"),
        ({"shard_bytes": 0}, "shard_bytes is 0"),
        ({"processes": 0}, "processes is 0"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_imagefolder(tmp_path, tmp_path / "out", **options)  # type: ignore[arg-type]


def write_pictures(root: Path, count: int = 12, side: int = 40) -> Path:
    for number in range(count):
        folder = root / ("train/cat", "train/dog", "val/dog")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(picture(side, side, seed=number))
    return root


OPTIONS: dict[str, Any] = {"samples_per_shard": 2, "max_side": 20, "quality": 80}


@contextmanager
def stopped_after(shards: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user interrupts when so many shards are written."""
    written = 0

    def write(*args: Any) -> Written:
        nonlocal written
        if written == shards:
            raise KeyboardInterrupt
        written += 1
        return write_shard(*args)

    with monkeypatch.context() as patch:
        patch.setattr("qsr_engine.data.writing.resuming.write_shard", write)
        with pytest.raises(KeyboardInterrupt):
            yield


def test_the_bytes_are_the_same_for_any_number_of_processes_and_interruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_pictures(tmp_path / "images")
    write_imagefolder(root, tmp_path / "one", **OPTIONS)
    expected = read_folder(tmp_path / "one")
    assert len(expected) == 8
    write_imagefolder(root, tmp_path / "two", processes=2, **OPTIONS)
    assert read_folder(tmp_path / "two") == expected
    for shards in (0, 1, 3):
        out = tmp_path / f"stopped-{shards}"
        with stopped_after(shards, monkeypatch):
            write_imagefolder(root, out, **OPTIONS)
        # With nothing finished there is nothing to go on from.
        assert set(read_folder(out)) == {*sorted(expected)[2 : shards + 2], *([RECORD_NAME] if shards else [])}
        times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
        write_imagefolder(root, out, **OPTIONS)
        assert read_folder(out) == expected
        assert {path: path.stat().st_mtime_ns for path in times} == times  # not written again


@pytest.mark.parametrize("damage", ["torn", "altered", "deleted", "unrecorded"])
def test_finished_shards_that_are_not_as_recorded_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    root, out = write_pictures(tmp_path / "images"), tmp_path / "out"
    write_imagefolder(root, tmp_path / "whole", **OPTIONS)
    with stopped_after(2, monkeypatch):
        write_imagefolder(root, out, **OPTIONS)
    shard, record = out / "train-000001.tar", out / RECORD_NAME
    data = shard.read_bytes()
    if damage == "deleted":
        shard.unlink()
    elif damage == "unrecorded":  # killed while the record was written
        lines = record.read_text().splitlines()
        record.write_text("\n".join([*lines[:-1], lines[-1][:30]]))
    else:
        shard.write_bytes(data[:-1] if damage == "torn" else data[:600] + b"?" + data[601:])
    (out / ".train-000002.tar.123.tmp").touch()  # of a process that was killed
    (out / ".notes.123.tmp").touch()
    write_imagefolder(root, out, **OPTIONS)
    assert read_folder(out) == {**read_folder(tmp_path / "whole"), ".notes.123.tmp": b""}


def test_another_plan_does_not_go_on_with_the_shards_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = write_pictures(tmp_path / "images"), tmp_path / "out"
    with stopped_after(2, monkeypatch):
        write_imagefolder(root, out, **OPTIONS)
    before = read_folder(out)
    with pytest.raises(DataError, match="is not written to its end; run the command that began it again"):
        index_shards(out)
    message = rf"out holds 2 finished shards of another data set: {{}}\. .*choose another folder, or delete {out}"
    for options, difference in (
        ({"seed": 1}, "seed was 0 and is 1 now"),
        ({"quality": 81}, "quality was 80 and is 81 now"),
        (
            {"samples_per_shard": 3, "max_side": 21},
            "max_side was 20 and is 21 now; samples_per_shard was 2 and is 3 now",
        ),
    ):
        with pytest.raises(DataError, match=message.format(difference)):
            write_imagefolder(root, out, **{**OPTIONS, **options})
    image = root / "train/cat/0.jpg"
    image.write_bytes(bytes(reversed(image.read_bytes())))  # of the same size
    with pytest.raises(DataError, match=message.format("the images had other names, sizes, labels or times of .*")):
        write_imagefolder(root, out, **OPTIONS)
    assert read_folder(out) == before


def test_shards_of_others_are_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = write_pictures(tmp_path / "images"), tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"theirs")
    with pytest.raises(DataError, match=r"tar files that this command has not begun \(train-000000\.tar\)"):
        write_imagefolder(root, out)
    assert read_folder(out) == {"train-000000.tar": b"theirs"}


def test_two_commands_do_not_write_in_one_folder(tmp_path: Path) -> None:
    root, out = write_pictures(tmp_path / "images"), tmp_path / "out"
    out.mkdir()
    folder = os.open(out, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another process writes in this folder"):
        write_imagefolder(root, out)
    os.close(folder)
    write_imagefolder(root, out)


def test_an_error_in_another_process_is_one_message_and_ends_the_others(tmp_path: Path) -> None:
    root, out = write_pictures(tmp_path / "images"), tmp_path / "out"
    broken = root / "val/dog/11.jpg"
    broken.write_bytes(broken.read_bytes()[:-30])
    before = set(psutil.Process().children())
    with pytest.raises(DataError, match=r"val/dog/11\.jpg: this does not decode as JPEG, PNG or WebP: .*truncated"):
        write_imagefolder(root, out, processes=2, **OPTIONS)
    after = set(psutil.Process().children()) - before
    assert not [child for child in after if "spawn_main" in " ".join(child.cmdline())]
    assert not list(out.glob(".*.tmp"))


def test_a_full_disk_is_said_and_finished_shards_stay(tmp_path: Path) -> None:
    root, out = tmp_path / "images", tmp_path / "out"
    for number in range(6):
        (root / "cat").mkdir(parents=True, exist_ok=True)
        size = 200_000 if number == 3 else 100
        (root / f"cat/{number}.jpg").write_bytes(picture(8, 8, seed=number) + bytes(size))
    write_imagefolder(root, tmp_path / "whole", samples_per_shard=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a write beyond fails as on a full disk
    try:
        with pytest.raises(DataError, match=r"train-00000\d\.tar: this cannot be written: .*; free some space and run"):
            write_imagefolder(root, out, samples_per_shard=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    stayed = read_folder(out)
    assert len(stayed) >= 3
    assert RECORD_NAME in stayed
    write_imagefolder(root, out, samples_per_shard=1)
    assert read_folder(out) == read_folder(tmp_path / "whole")


def begin_command(root: Path, out: Path, finished: int) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """`qsr shards imagefolder` with two processes, when so many shards are finished; and its children."""
    words = ["shards", "imagefolder", root, out, "--processes", 2, "--samples-per-shard", 2, "--max-side", 400]
    command = [sys.executable, "-m", "qsr_engine", *map(str, words)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell starts in the background ignores Ctrl-C, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 60
    while not (out / RECORD_NAME).exists() or (out / RECORD_NAME).read_text().count("\n") < finished + 1:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take long enough to be killed in between."""
    root = tmp_path_factory.mktemp("large")
    (root / "cat").mkdir()
    for number in range(40):
        (root / f"cat/{number}.jpg").write_bytes(picture(900, 900, seed=number % 2))
    return root


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_command_goes_on_where_it_stopped(tmp_path: Path, large: Path, number: signal.Signals) -> None:
    root, out = large, tmp_path / "out"
    process, children = begin_command(root, out, finished=2)
    # Ctrl-C goes to all processes of a terminal.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert "Traceback" not in said
    left = set(read_folder(out))
    assert RECORD_NAME in left
    assert "index.json" not in left
    if number != signal.SIGKILL:
        assert not any(name.endswith(".tmp") for name in left)
    finished = [json.loads(line)["name"] for line in (out / RECORD_NAME).read_text().splitlines()[1:]]
    times = {name: (out / name).stat().st_mtime_ns for name in finished}
    if number == signal.SIGKILL:
        write_imagefolder(root, out, samples_per_shard=2, max_side=400)
        assert {name: (out / name).stat().st_mtime_ns for name in finished} == times
        write_imagefolder(root, tmp_path / "whole", samples_per_shard=2, max_side=400)
        assert read_folder(out) == read_folder(tmp_path / "whole")


def test_a_killed_writer_ends_the_command(tmp_path: Path, large: Path) -> None:
    process, children = begin_command(large, tmp_path / "out", finished=1)
    writer = next(child for child in children if "spawn_main" in " ".join(child.cmdline()))
    writer.kill()
    said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("qsr: error: one of the processes was killed or did not start")
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert not list((tmp_path / "out").glob(".*.tmp"))
