"""The archives of ILSVRC2012 and of CIFAR-10."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import CIFAR10
from torchvision.datasets import imagenet as torchvision_imagenet

from qsr_engine.cli.main import main
from qsr_engine.data import DataError, write_cifar10, write_imagefolder
from tests.support.shard_files import decoded, picture, read_samples, tar_bytes, write_tar

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
        found = [(s.image, s.label) for s in read_samples(tmp_path / "out", index, split)]
        assert len(found) == len(images)
        assert set(found) == images
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
    assert {(s.image, s.label) for s in read_samples(tmp_path / "unpacked", index, "val")} == content["val"]


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
        found = [(decoded(s).tobytes(), s.label) for s in read_samples(tmp_path / "out", index, split)]
        assert sorted(found) == sorted(images)
        assert found != images  # shuffled
    again = write_cifar10(tmp_path / "again", root=tmp_path / "root", samples_per_shard=20)
    assert again == index


def test_cifar10_says_what_to_put_where_when_there_is_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody answers there
    assert main(["shards", "cifar10", str(tmp_path / "out"), "--root", str(tmp_path / "root")]) == 1
    message = r"cannot be downloaded \(.*refused.*put cifar-10-python\.tar\.gz from http.*cifar-10-python\.tar\.gz into"
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
