"""Making shards of digits, of folders of images, and an index of shards that exist."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qsr_engine.data import (
    DataError,
    check_shards,
    index_shards,
    read_index,
    verify_shards,
    write_digits,
    write_imagefolder,
)
from tests.support.shard_files import read_samples, write_images, write_tar


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_digits_are_1437_for_training_and_360_for_evaluation(digits: Path) -> None:
    index = read_index(digits)
    assert {name: split.samples for name, split in index.splits.items()} == {"train": 1437, "val": 360}
    assert index.classes == [str(digit) for digit in range(10)]
    assert [shard.samples for shard in index.splits["val"].shards] == [128, 128, 104]
    for name in index.splits:
        check_shards(digits, index, name)
    verify_shards(digits)


def test_more_digits_for_evaluation(tmp_path: Path) -> None:
    index = write_digits(tmp_path / "digits", eval_samples=900)
    assert {name: split.samples for name, split in index.splits.items()} == {"train": 897, "val": 900}
    for none_is_left in (0, 1797):
        with pytest.raises(DataError, match=rf"eval_samples is {none_is_left} of 1797 digits; write a number from 1"):
            write_digits(tmp_path / "other", eval_samples=none_is_left)


def test_digits_are_all_there_once_with_their_labels(digits: Path) -> None:
    from sklearn.datasets import load_digits

    index = read_index(digits)
    written = Counter(
        (np.asarray(Image.open(io.BytesIO(sample.image))).tobytes(), sample.label)
        for split in index.splits
        for sample in read_samples(digits, index, split)
    )
    source = load_digits()
    pixels = np.round(source.images * 255 / 16).astype(np.uint8)
    assert written == Counter((image.tobytes(), int(label)) for image, label in zip(pixels, source.target, strict=True))


def test_writing_twice_gives_the_same_bytes_and_another_seed_gives_others(digits: Path, tmp_path: Path) -> None:
    index = read_index(digits)
    again = write_digits(tmp_path / "again")
    other = write_digits(tmp_path / "other", seed=1)
    assert again == index
    assert again.digest() == index.digest() != other.digest()
    assert 0 <= index.digest() < 2**63
    assert again.splits["train"].shards[0].sha256 != other.splits["train"].shards[0].sha256


def test_keys_are_running_numbers_and_nothing_temporary_stays(digits: Path) -> None:
    index = read_index(digits)
    # Reports of runs on this data, and checkpoints inside an epoch, stand on this order.
    assert [sample.label for sample in read_samples(digits, index, "val")][:12] == [2, 8, 7, 9, 5, 9, 3, 4, 7, 8, 4, 3]
    assert [sample.key for sample in read_samples(digits, index, "val")] == [f"{number:08d}" for number in range(360)]
    names = {shard.name for split in index.splits.values() for shard in split.shards}
    assert {path.name for path in digits.iterdir()} == {*names, "index.json", "samples.npy"}


def test_a_failed_write_leaves_neither_shard_nor_index(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"train/cat": 2})
    (tmp_path / "images/train/cat/empty.png").touch()
    with pytest.raises(DataError, match=r"empty\.png: this image is an empty file"):
        write_imagefolder(tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "images/train/cat/empty.png").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"empty\.png: this is neither JPEG, PNG nor WebP, it begins with b'GIF89a'"):
        write_imagefolder(tmp_path / "images", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_data_set_is_not_overwritten(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds a data set already .*index\.json.*choose another folder, or delete"):
        write_digits(digits)
    write_images(tmp_path / "images", {"cat": 1})
    with pytest.raises(DataError, match="holds a data set already"):
        write_imagefolder(tmp_path / "images", digits)
    with pytest.raises(DataError, match="holds a data set already"):
        index_shards(digits)


def test_out_must_be_a_folder_and_shards_must_have_samples(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be made"):
        write_digits(tmp_path / "file" / "out")
    with pytest.raises(DataError, match="samples_per_shard is 0"):
        write_digits(tmp_path, samples_per_shard=0)


def test_imagefolder_round_trip_keeps_every_byte_and_label(tmp_path: Path) -> None:
    root, out = tmp_path / "images", tmp_path / "out"
    write_images(root, {"train/dog": 3, "train/cat": 4}, name="{}.JPEG")
    write_images(root, {"validation/cat": 1, "validation/dog": 2})
    (root / "train/cat/notes.txt").write_text("not an image")
    (root / "train/.cache").mkdir()
    index = write_imagefolder(root, out, samples_per_shard=3)
    assert read_index(out) == index
    assert index.classes == ["cat", "dog"]
    assert [shard.samples for shard in index.splits["train"].shards] == [3, 3, 1]
    for split, folder in (("train", "train"), ("val", "validation")):
        files = Counter(
            (path.read_bytes(), label)
            for label, name in enumerate(["cat", "dog"])
            for path in (root / folder / name).iterdir()
            if path.suffix != ".txt"
        )
        assert Counter((s.image, s.label) for s in read_samples(out, index, split)) == files
    assert set(members(out / "train-000002.tar")) == {"00000006.cls", "00000006.jpg"}
    assert set(members(out / "val-000000.tar")) == {f"0000000{n}.{end}" for n in range(3) for end in ("cls", "png")}


def test_imagefolder_is_shuffled_by_the_seed(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"a": 10, "b": 10})
    labels = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        index = write_imagefolder(tmp_path / "images", tmp_path / name, seed=seed)
        labels[name] = [sample.label for sample in read_samples(tmp_path / name, index, "train")]
    assert labels["one"] == labels["same"] != labels["other"]
    assert labels["one"] != sorted(labels["one"])


def test_classes_without_split_folders_are_one_split(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"train": 1, "plane": 1})  # a class may be called train
    index = write_imagefolder(tmp_path / "images", tmp_path / "out", split="holdout")
    assert index.classes == ["plane", "train"]
    assert list(index.splits) == ["holdout"]
    assert index.splits["holdout"].shards[0].name == "holdout-000000.tar"


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, "there are no class folders here"),
        ({"train/cat": 1, "train/dog": 0}, "dog: there are no images here"),
        ({"train/cat": 1, "val/cat": 1, "val/cow": 1}, "cow: training has no class 'cow'"),
        ({"train/cat": 1, "val/cat": 1, "validation/cat": 1}, "both val and validation are here"),
        ({"train/cat": 1, "val": 1}, "val: there are no class folders here"),
    ],
)
def test_wrong_image_folders_are_named(tmp_path: Path, folders: dict[str, int], message: str) -> None:
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", folders)
    with pytest.raises(DataError, match=message):
        write_imagefolder(tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_root_unreadable_image_and_wrong_split_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        write_imagefolder(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "cat" / "directory.png").mkdir(parents=True)
    with pytest.raises(DataError, match=r"directory\.png: this image cannot be read: it is no regular file"):
        write_imagefolder(tmp_path, tmp_path.with_name("out"), split="train")
    with pytest.raises(DataError, match=r"the split name is '\.\./train'"):
        write_imagefolder(tmp_path, tmp_path.with_name("out"), split="../train")


@pytest.mark.parametrize("out", ["images/shards", "link", "link/shards", "other/shards", "images/cat", "images"])
def test_shards_are_not_written_where_the_next_call_would_list_them(tmp_path: Path, out: str) -> None:
    root = tmp_path / "images"
    write_images(root, {"cat": 1, "dog": 1})
    write_images(tmp_path, {"elsewhere": 1})
    (root / "cow").symlink_to(tmp_path / "elsewhere")  # a class
    (tmp_path / "link").symlink_to(root / "shards")
    (tmp_path / "other").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    if out == "link/shards":
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to(root / "dog")
    with pytest.raises(DataError, match=rf"{out} is in .*, where images are looked for; name a folder outside of it"):
        write_imagefolder(root, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("out", ["train/shards", "val", "test/shards"])
def test_shards_do_not_become_a_class_or_a_split(tmp_path: Path, out: str) -> None:
    write_images(tmp_path, {"train/cat": 1})
    with pytest.raises(DataError, match="where images are looked for"):
        write_imagefolder(tmp_path, tmp_path / out)
    assert not (tmp_path / out).exists()
    (tmp_path / "shards").mkdir()
    write_imagefolder(tmp_path, tmp_path / "shards")  # beside train/ they are neither
    verify_shards(tmp_path / "shards")


def test_existing_shards_are_counted_and_checked(small: Path) -> None:
    index = read_index(small)
    assert index.classes is None
    assert {name: split.samples for name, split in index.splits.items()} == {"train": 4, "val": 2}
    assert [shard.name for shard in index.splits["train"].shards] == ["train-000000.tar", "train-000001.tar"]
    verify_shards(small)


def test_index_of_digits_shards_agrees_with_the_one_that_writing_made(digits: Path, tmp_path: Path) -> None:
    for path in digits.glob("*.tar"):
        (tmp_path / path.name).symlink_to(path)
    assert index_shards(tmp_path).splits == read_index(digits).splits


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train.tar",
            {"a.jpg": b"A", "a.cls": b"0"},
            r"the name 'train\.tar' does not say its split; write --split train=",
        ),
        ("train-one.tar", {}, r"the name 'train-one\.tar' does not say its split"),
        ("train-00-of.tar", {}, r"the name 'train-00-of\.tar' does not say its split"),
        ("-0.tar", {}, r"the name '-0\.tar' does not say its split"),
        ("tr:ain-000000.tar", {}, r"the name 'tr:ain-000000\.tar' does not say .*, without \\ : or \.\."),
        ("tr\nain-000000.tar", {}, r"the name 'tr\\nain-000000\.tar' does not say"),
        (os.fsdecode(b"caf\xe9-000000.tar"), {}, r"the name 'caf\\udce9-000000\.tar' does not say"),
        ("train-0.tar", {}, r"train-0\.tar: this shard has no samples"),
        ("train-0.tar", {"k7.jpg": b"A"}, r"train-0\.tar: sample 'k7' has no label"),
        ("train-0.tar", {"k7.txt": b"A", "k7.cls": b"0"}, r"train-0\.tar: sample 'k7' has no image"),
        ("train-0.tar", {"k7.jpg": b"A", "k7.cls": b"cat"}, r"train-0\.tar: sample 'k7' has the label b'cat'"),
        ("train-0.tar", {"a.jpg": b"A", "a.JPG": b"A"}, r"train-0\.tar: sample 'a' has two members of one name"),
    ],
)
def test_unusable_shards_are_not_indexed(tmp_path: Path, name: str, content: dict[str, bytes], message: str) -> None:
    write_tar(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        index_shards(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000000-of-000002.tar", "train"),
        ("imagenet_train-0001.tar", "imagenet_train"),
        ("imagenet-2012-000001.tar", "imagenet-2012"),
        ("a-of-2-of-3-4-of-5.tar", "a-of-2-of-3"),
        ("train set-0.tar", "train set"),
    ],
)
def test_the_split_is_what_stands_before_the_numbers(tmp_path: Path, name: str, split: str) -> None:
    write_tar(tmp_path / name, {"a.jpg": b"A", "a.cls": b"0"})
    assert list(index_shards(tmp_path).splits) == [split]
    verify_shards(tmp_path)


def test_names_are_looked_at_before_a_shard_is_read(tmp_path: Path) -> None:
    (tmp_path / "a-0.tar").write_bytes(b"not a tar file")
    write_tar(tmp_path / "b.tar", {})
    with pytest.raises(DataError, match=r"the name 'b\.tar'"):
        index_shards(tmp_path)


def test_folders_and_dangling_links_are_no_shards(tmp_path: Path) -> None:
    shard = tmp_path / "train-000000.tar"
    shard.mkdir()
    with pytest.raises(DataError, match=r"train-000000\.tar: this shard cannot be read: Is a directory; copy or write"):
        index_shards(tmp_path)
    shard.rmdir()
    shard.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"train-000000\.tar: this shard cannot be read: No such file or directory; "):
        index_shards(tmp_path)
    with pytest.raises(DataError, match="nowhere: this folder cannot be read: No such file or directory"):
        index_shards(tmp_path / "nowhere")


def test_keys_need_not_be_utf8(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, other = os.fsdecode(b"caf\xe9"), os.fsdecode(b"caf\xea")
    content = {f"{one}.jpg": b"A", f"{one}.cls": b"0", f"{other}.jpg": b"B", f"{other}.cls": b"1"}
    write_tar(tmp_path / "train-000000.tar", content)
    index_shards(tmp_path)
    verify_shards(tmp_path)
    (tmp_path / "index.json").unlink()
    write_tar(tmp_path / "train-000000.tar", {f"{one}.jpg": b"A", f"{one}.{other}": b"0"})
    with pytest.raises(DataError) as caught:
        index_shards(tmp_path)
    message = str(caught.value)
    assert message.endswith(r"sample 'caf\udce9' has no label (.cls); its members are: jpg, 'caf\udcea'")
    print(message)  # to any stream
    assert r"'caf\udce9'" in capfd.readouterr().out


def test_files_that_are_no_tar_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no tar shards here"):
        index_shards(tmp_path)
    for content in (b"", b"not a tar file" * 100):
        (tmp_path / "train-000000.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"train-000000\.tar: this shard cannot be read past sample 0: it is trunc"):
            index_shards(tmp_path)


def test_the_index_is_read_without_importing_torch() -> None:
    code = "import sys, qsr_engine.data; assert not {'torch', 'webdataset', 'sklearn'} & set(sys.modules)"
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
