"""`qsr shards imagefolder` and `cifar10`: the plan, several processes, kills, archives, smaller images."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets import CIFAR10
from torchvision.datasets import imagenet as torchvision_imagenet

from qsr_engine.cli.main import main
from qsr_engine.data import DataError, Index, index_shards, write_cifar10, write_imagefolder
from qsr_engine.data import images as writing_images
from qsr_engine.data.index import Shard
from qsr_engine.data.samples import Sample, parse_sample
from qsr_engine.data.streaming import read_shard
from qsr_engine.data.writing.resuming import RECORD_NAME, ShardSize
from qsr_engine.data.writing.shard import sample_bytes, write_shard
from tests.support.shard_files import picture, read_folder, tar_bytes, write_images, write_tar

ROOT = Path(__file__).parents[3]


def samples(folder: Path, index: Index, split: str) -> list[Sample]:
    return [
        parse_sample(str(folder / shard.name), raw, index.class_count)
        for shard in index.split(split).shards
        for raw in read_shard(folder / shard.name)
    ]


def decoded(sample: Sample) -> Image.Image:
    return Image.open(io.BytesIO(sample.image))


# -------------------------------------------------------------------------------------------------- the plan


def test_shards_end_before_they_have_more_bytes_than_asked(tmp_path: Path) -> None:
    (tmp_path / "images/cat").mkdir(parents=True)
    for number in range(40):
        padding = bytes(700 * (number % 7))  # after the end of a JPEG, where decoders don't look
        (tmp_path / f"images/cat/{number}.jpg").write_bytes(picture(8, 8, seed=number) + padding)
    limit = 30_000
    index = write_imagefolder(tmp_path / "images", tmp_path / "out", shard_bytes=limit)
    shards = index.splits["train"].shards
    taken = [
        sum(sample_bytes(len(s.image)) for s in samples(tmp_path / "out", one(shard), "train")) for shard in shards
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
    assert {sample.image for sample in samples(tmp_path / "out", index, "train")} == {
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


# ----------------------------------------------------------------------------- several processes, and resuming


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

    def write(*args: Any) -> Shard:
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
    assert len(expected) == 7
    write_imagefolder(root, tmp_path / "three", processes=3, **OPTIONS)
    assert read_folder(tmp_path / "three") == expected
    for shards in (0, 1, 3):
        out = tmp_path / f"stopped-{shards}"
        with stopped_after(shards, monkeypatch):
            write_imagefolder(root, out, **OPTIONS)
        # With nothing finished there is nothing to go on from.
        assert set(read_folder(out)) == {*sorted(expected)[1 : shards + 1], *([RECORD_NAME] if shards else [])}
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
    with pytest.raises(DataError, match=r"val/dog/11\.jpg: this does not decode as JPEG or PNG: .*truncated"):
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
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith("qsr: error: one of the processes was killed or did not start")
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert not list((tmp_path / "out").glob(".*.tmp"))


# ------------------------------------------------------------------------------------------- smaller images


def write_one(tmp_path: Path, data: bytes, **options: int) -> Sample:
    (tmp_path / "images/cat").mkdir(parents=True)
    (tmp_path / "images/cat/it.JPEG").write_bytes(data)
    index = write_imagefolder(tmp_path / "images", tmp_path / "out", **options)  # type: ignore[arg-type]
    return samples(tmp_path / "out", index, "train")[0]


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"max_side": 50}, (200, 101), (50, 25)),
        ({"max_side": 50}, (101, 200), (25, 50)),
        ({"short_side": 50}, (200, 100), (100, 50)),
        ({"short_side": 50}, (100, 200), (50, 100)),
        ({"max_side": 50}, (500, 6), (50, 1)),
        ({"max_side": 149}, (1990, 20), (149, 2)),  # 149 x 1 would be refused by training
    ],
)
def test_large_images_are_resized(
    tmp_path: Path, options: dict[str, int], before: tuple[int, int], after: tuple[int, int]
) -> None:
    data = picture(*before)
    small = decoded(write_one(tmp_path, data, **options))
    assert (small.size, small.format, small.mode) == (after, "JPEG", "RGB")
    stream = io.BytesIO()
    decoded_whole = Image.open(io.BytesIO(data)).resize(after, Image.Resampling.LANCZOS)
    decoded_whole.save(stream, format="JPEG", quality=90)
    difference = np.asarray(small, int) - np.asarray(Image.open(stream), int)
    assert np.abs(difference).mean() < 2  # decoding at half of the size, which is faster, is hardly seen


@pytest.mark.parametrize("options", [{}, {"max_side": 60, "quality": 5}, {"short_side": 40, "quality": 5}])
@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("PNG", "RGBA"), ("JPEG", "CMYK")])
def test_images_that_are_small_enough_stay_byte_for_byte(
    tmp_path: Path, options: dict[str, int], kind: str, mode: str
) -> None:
    data = picture(60, 40, kind=kind, mode=mode)
    assert write_one(tmp_path, data, **options).image == data
    suffix = "jpg" if kind == "JPEG" else "png"  # by content: the file is called it.JPEG
    assert f"00000000.{suffix}".encode() in (tmp_path / "out/train-000000.tar").read_bytes()


@pytest.mark.parametrize(
    ("kind", "mode", "becomes"),
    [
        ("PNG", "RGBA", "RGB"),
        ("PNG", "P", "RGB"),
        ("PNG", "1", "L"),
        ("PNG", "LA", "L"),
        ("JPEG", "CMYK", "RGB"),
        ("JPEG", "L", "L"),
    ],
)
def test_other_modes_become_rgb_or_grey_jpeg(tmp_path: Path, kind: str, mode: str, becomes: str) -> None:
    small = decoded(write_one(tmp_path, picture(60, 40, kind=kind, mode=mode), max_side=30))
    assert (small.size, small.format, small.mode) == ((30, 20), "JPEG", becomes)


def test_quality_is_that_of_the_smaller_jpeg(tmp_path: Path) -> None:
    sizes = [len(write_one(tmp_path / str(q), picture(200, 200), max_side=150, quality=q).image) for q in (30, 90, 100)]
    assert sizes == sorted(sizes)
    default = write_one(tmp_path / "default", picture(200, 200), max_side=150).image
    assert len(default) == sizes[1]


def test_the_orientation_in_exif_is_ignored(tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(picture(80, 40)))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    stream = io.BytesIO()
    image.save(stream, format="JPEG", exif=exif)
    assert ImageOps.exif_transpose(Image.open(io.BytesIO(stream.getvalue()))).size == (40, 80)  # the trap is set
    small = decoded(write_one(tmp_path, stream.getvalue(), max_side=40))
    assert small.size == ImageOps.exif_transpose(small).size == (40, 20)


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png_header(10_001, 10_000), r"it\.JPEG has 10001 x 10000 pixels; the limit is 100,000,000$"),
        (png_header(60_000, 60_000), r"it\.JPEG has too many pixels; the limit is 100,000,000$"),
        (picture(303, 3), r"it\.JPEG has 303 x 3 pixels; the limit is a side 100 times as long as the other$"),
        (picture(60, 60) + 100 * b"\xff\xda", r"it\.JPEG has 101 scans; the limit is 100$"),
        (picture(60, 60)[:-300], r"it\.JPEG: this does not decode as JPEG or PNG: .*truncated"),
        (b"RIFF    WEBP", r"it\.JPEG: this does not decode as JPEG or PNG: cannot identify the image; replace or"),
    ],
)
def test_images_that_cannot_be_made_smaller_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_one(tmp_path, data, max_side=30)


def test_limits_are_those_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    writing_images.check_limits(10, 1000, "it")
    writing_images.check_scans(100 * b"\xff\xda", "no JPEG")
    writing_images.check_scans(b"\xff\xd8" + 100 * b"\xff\xda", "it")
    monkeypatch.setattr(writing_images, "MAX_PIXELS", 9_999)
    with pytest.raises(DataError, match=r"^it has 10 x 1000 pixels; the limit is 9,999$"):
        writing_images.check_limits(10, 1000, "it")
    monkeypatch.setattr(writing_images, "MAX_ASPECT", 2)
    with pytest.raises(DataError, match=r"^it has 1 x 3 pixels; the limit is a side 2 times as long as the other$"):
        writing_images.check_limits(1, 3, "it")
    monkeypatch.setattr(writing_images, "MAX_SCANS", 1)
    with pytest.raises(DataError, match=r"^it has 2 scans; the limit is 1$"):
        writing_images.check_scans(b"\xff\xd8" + 2 * b"\xff\xda", "it")


def test_reasons_have_no_addresses_and_are_never_empty() -> None:
    with pytest.raises(UnidentifiedImageError) as caught:
        Image.open(io.BytesIO(b"GIF"))
    assert writing_images.reason(caught.value) == "cannot identify the image"
    assert writing_images.reason(OSError("broken")) == "broken"
    assert writing_images.reason(EOFError()) == "EOFError"


def grey16(values: np.ndarray[Any, Any], **options: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(stream, format="PNG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_become_eight(mode: str) -> None:
    ramp = np.arange(65536).reshape(256, 256)
    with Image.open(io.BytesIO(grey16(ramp, transparency=40_000))) as image:
        assert image.mode == "I;16"
        eight = writing_images.to_eight_bits(image if mode == "I;16" else image.convert("I"))
    assert eight.mode == "L"
    assert np.array_equal(np.asarray(eight), np.round(ramp * 255 / 65535))
    assert np.array_equal(np.asarray(eight.convert("RGBA"))[..., 3], np.full((256, 256), 255))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "F"])
def test_images_of_eight_bits_stay_as_they_are(mode: str) -> None:
    image = Image.new(mode, (2, 2))
    assert writing_images.to_eight_bits(image) is image


def test_a_png_of_sixteen_bits_is_not_made_white(tmp_path: Path) -> None:
    small = decoded(write_one(tmp_path, grey16(np.full((40, 60), 30_000)), max_side=30))
    assert (small.size, small.mode) == ((30, 20), "L")
    assert np.abs(np.asarray(small, int) - round(30_000 / 257)).max() <= 1


# ---------------------------------------------------------------------------------------- archives of ILSVRC

WNIDS = ["n01440764", "n01443537", "n02105855"]
IDS = {"n01440764": 2, "n01443537": 1, "n02105855": 3}  # the numbers of the devkit are not in the order of the WNIDs
TRUTH = [3, 1, 2, 1]  # of the validation images


def write_archives(root: Path) -> dict[str, set[tuple[bytes, int]]]:
    """The three files of ILSVRC2012 with small images. Returns (bytes, label) of what is in them, by split."""
    from scipy.io import savemat

    root.mkdir()
    train, content = {}, {"train": set[tuple[bytes, int]](), "val": set[tuple[bytes, int]]()}
    for label, wnid in enumerate(WNIDS):
        images = {f"{wnid}_{n}.JPEG": picture(8, 8, seed=10 * label + n) for n in range(3)}
        train[f"{wnid}.tar"] = tar_bytes(images)
        content["train"] |= {(data, label) for data in images.values()}
    write_tar(root / "ILSVRC2012_img_train.tar", dict(reversed(train.items())))  # its order is no matter
    val = {f"ILSVRC2012_val_{n + 1:08d}.JPEG": picture(8, 8, seed=100 + n) for n in range(len(TRUTH))}
    write_tar(root / "ILSVRC2012_img_val.tar", dict(reversed(val.items())))
    of_id = {number: wnid for wnid, number in IDS.items()}
    content["val"] = {(data, WNIDS.index(of_id[n])) for data, n in zip(val.values(), TRUTH, strict=True)}
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows: list[tuple[Any, ...]] = [
        (number, wnid, "tench, Tinca tinca", "a fish", 0, [], 0) for wnid, number in IDS.items()
    ]
    rows.append((1001, "n00001740", "entity", "all there is", 3, [1, 2, 3], 19))  # an inner node, no class
    synsets = np.array([tuple(map(as_object, row)) for row in rows], dtype=[(name, object) for name in fields])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, TRUTH)).encode()
        + b"\n",
    }
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(tar_bytes(devkit)))
    return content


def as_object(value: Any) -> Any:
    return np.array(value, dtype=float) if isinstance(value, list) else value


def test_archives_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "ilsvrc"
    content = write_archives(root)
    index = write_imagefolder(root, tmp_path / "out", samples_per_shard=2)
    assert index.classes == WNIDS
    for split, images in content.items():
        found = [(s.image, s.label) for s in samples(tmp_path / "out", index, split)]
        assert len(found) == len(images)
        assert set(found) == images
    write_imagefolder(root, tmp_path / "two", samples_per_shard=2, processes=2)
    assert read_folder(tmp_path / "two") == read_folder(tmp_path / "out")
    # The labels are those that torchvision finds in the same devkit.
    monkeypatch.setattr(torchvision_imagenet, "_verify_archive", lambda *_: None)
    torchvision_imagenet.parse_devkit_archive(root)
    assert torchvision_imagenet.load_meta_file(root)[1] == ["n02105855", "n01443537", "n01440764", "n01443537"]
    assert {WNIDS[label] for _, label in content["val"]} == set(torchvision_imagenet.load_meta_file(root)[1])


def test_either_archive_may_be_missing_or_unpacked(tmp_path: Path) -> None:
    content = write_archives(tmp_path / "ilsvrc")
    (tmp_path / "ilsvrc/ILSVRC2012_img_train.tar").rename(tmp_path / "train.tar")
    index = write_imagefolder(tmp_path / "ilsvrc", tmp_path / "val-only")
    assert (index.classes, list(index.splits)) == (WNIDS, ["val"])
    (tmp_path / "train.tar").rename(tmp_path / "ilsvrc/ILSVRC2012_img_train.tar")
    for data, label in content["val"]:
        path = tmp_path / "ilsvrc/val" / WNIDS[label] / f"{hashlib.sha256(data).hexdigest()}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "ilsvrc/ILSVRC2012_img_val.tar").write_bytes(b"the folder is read, not this")
    index = write_imagefolder(tmp_path / "ilsvrc", tmp_path / "unpacked")
    assert {(s.image, s.label) for s in samples(tmp_path / "unpacked", index, "val")} == content["val"]


def cut(name: str, bytes_: int) -> Any:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:bytes_])


def replace_tar(name: str, content: dict[str, bytes]) -> Any:
    return lambda root: write_tar(root / name, content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "ILSVRC2012_devkit_t12.tar.gz").unlink(), r"devkit_t12\.tar\.gz is missing, and it has"),
        (cut("ILSVRC2012_devkit_t12.tar.gz", 300), r"devkit_t12\.tar\.gz: the validation labels cannot be read"),
        (cut("ILSVRC2012_img_val.tar", 1300), r"img_val\.tar: this archive cannot be read: .*truncated"),
        (cut("ILSVRC2012_img_val.tar", 1536), r"img_val\.tar: this archive is truncated or broken after 1 members"),
        (cut("ILSVRC2012_img_train.tar", 15_000), r"img_train\.tar: this archive cannot be read: .*truncated"),
        (cut("ILSVRC2012_img_train.tar", 0), r"img_train\.tar: this archive cannot be read"),
        (replace_tar("ILSVRC2012_img_train.tar", {"a.JPEG": b"a"}), r"a\.JPEG is not the tar of a class"),
        (replace_tar("ILSVRC2012_img_train.tar", {"n1.tar": tar_bytes({"a": b""})}), "a is empty"),
        (replace_tar("ILSVRC2012_img_train.tar", {"n1.tar": tar_bytes({})}), r"n1\.tar has no images"),
        (
            replace_tar("ILSVRC2012_img_train.tar", {"n1.tar": tar_bytes({"a": b"a"})}),
            r"img_val\.tar: training has no class 'n01440764'",
        ),
        (replace_tar("ILSVRC2012_img_val.tar", {"a": b"a"}), r"has 1 images, and .* has 4 labels"),
    ],
)
def test_wrong_archives_are_named(tmp_path: Path, damage: Any, message: str) -> None:
    write_archives(tmp_path / "ilsvrc")
    damage(tmp_path / "ilsvrc")
    with pytest.raises(DataError, match=message):
        write_imagefolder(tmp_path / "ilsvrc", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- CIFAR-10


def write_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[bytes, int]]]:
    """CIFAR-10's files with 10 random images each, which torchvision is told to take for the real ones."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    content: dict[str, list[tuple[bytes, int]]] = {"train": [], "val": []}
    lists: dict[str, list[list[str]]] = {"train": [], "val": []}
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        split = "val" if name == "test_batch" else "train"
        data = generator.integers(0, 256, (10, 3072), dtype=np.uint8)
        labels = generator.integers(0, 10, 10).tolist()
        pickled = pickle.dumps({"data": data, "labels": labels})
        (folder / name).write_bytes(pickled)
        lists[split].append([name, hashlib.md5(pickled).hexdigest()])
        planes = data.reshape(10, 3, 32, 32).transpose(0, 2, 3, 1)
        content[split] += [(image.tobytes(), label) for image, label in zip(planes, labels, strict=True)]
    meta = pickle.dumps({"label_names": [f"class {n}" for n in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", lists["train"])
    monkeypatch.setattr(CIFAR10, "test_list", lists["val"])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(meta).hexdigest()})
    return content


def test_cifar10_is_written_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_batches(tmp_path / "root", monkeypatch)
    index = write_cifar10(tmp_path / "out", root=tmp_path / "root", samples_per_shard=20)
    assert index.classes == [f"class {n}" for n in range(10)]
    assert [shard.samples for shard in index.splits["train"].shards] == [20, 20, 10]
    for split, images in content.items():
        found = [(decoded(s).tobytes(), s.label) for s in samples(tmp_path / "out", index, split)]
        assert sorted(found) == sorted(images)
        assert found != images  # shuffled
    again = write_cifar10(tmp_path / "again", root=tmp_path / "root", samples_per_shard=20)
    assert again == index


def test_cifar10_says_what_to_put_where_when_there_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody answers there
    assert main(["shards", "cifar10", str(tmp_path / "out"), "--root", str(tmp_path / "root")]) == 2
    message = r"cannot be downloaded \(.*refused.*put cifar-10-python\.tar\.gz from http.*cifar-10-python\.tar\.gz into"
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
