"""List the images of ImageNet's layout: files in class folders, or members of ILSVRC's archives."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from qsr_engine.data.errors import DataError
from qsr_engine.data.samples import IMAGE_SUFFIXES
from qsr_engine.data.writing.counted import Passed, PassedOver
from qsr_engine.data.writing.imagenet import TRAIN, VAL, list_train, list_val
from qsr_engine.data.writing.stored import ListedImage, StoredImage

SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
SUFFIXES = tuple(f".{suffix}" for suffix in IMAGE_SUFFIXES)  # of image files, in any case


class Images(NamedTuple):
    """All images of a data set. `digest` is the SHA-256 of their names, sizes, labels and times of modification."""

    classes: list[str]
    splits: dict[str, list[StoredImage]]  # sorted by class and name
    digest: str
    passed_over: list[PassedOver]  # files and folders beside the images


def find_images(root: Path, split: str | None, out: Path) -> Images:
    """List the images below root, in ImageNet's layout of folders, or in the archives of ILSVRC2012.

    Args:
        out: where the shards will be; it must not lie where another call would take it for a class.
    Raises:
        DataError: as write_imagefolder() does for what lies in root.
    """
    try:
        return _find_images(root, split, out)
    except OSError as error:
        where, why = error.filename or root, error.strerror or error
        raise DataError(f"{where}: this cannot be read: {why}; mend that, or name another folder") from error


def _find_images(root: Path, split: str | None, out: Path) -> Images:
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; name the folder that holds train/ and val/, or the classes")
    folders = {split: root} if split is not None else _split_folders(root)
    train_tar, val_tar = root / TRAIN, root / VAL
    archives = {"train": train_tar, "val": val_tar} if split is None else {}
    archives = {name: path for name, path in archives.items() if path.is_file() and name not in folders}
    if not folders and not archives:
        folders = {"train": root}
    # Split folders that are not there yet count: after a kill `out` would be one.
    _refuse_inside(out, folders.values() if root in folders.values() else [root / name for name in SPLIT_FOLDERS])

    classes: list[str] | None = None
    listed: dict[str, Iterator[ListedImage]] = {}
    passed = Passed()
    if "train" in archives:
        classes, listed["train"] = list_train(train_tar)
    elif folders:
        classes = _class_names(folders.get("train") or next(iter(folders.values())))
    if "val" in archives:
        classes, listed["val"] = list_val(val_tar, classes)
    assert classes is not None  # each of the three ways above sets it
    _check_names(root, classes)
    for name, folder in folders.items():
        listed[name] = _list_folder(folder, classes, out, passed.add)

    sha256, splits = hashlib.sha256(), {}
    for name in sorted(listed, key=[*SPLIT_FOLDERS.values(), split].index):
        splits[name] = [_hashed(sha256, name, *image) for image in listed[name]]
    return Images(classes, splits, sha256.hexdigest(), passed.found())


def _hashed(sha256: hashlib._Hash, split: str, source: StoredImage, identity: str) -> StoredImage:
    text = f"{split}\0{identity}\0{source.offset}\0{source.size}\0{source.label}\0\0"
    sha256.update(text.encode(errors="surrogateescape"))
    return source


def _split_folders(root: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, of_split in SPLIT_FOLDERS.items():
        if (root / name).is_dir():
            if of_split in found:
                raise DataError(f"{root}: both {found[of_split].name} and {name} are here; keep one of them")
            found[of_split] = root / name
    return found


def _class_names(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: there are no class folders here; write one folder of images for each class")
    return names


def _check_names(root: Path, classes: list[str]) -> None:
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{root}: the class name {os.fsencode(name)!r} is not UTF-8; rename its folder") from None


def _refuse_inside(out: Path, folders: Iterable[Path]) -> None:
    """Raises DataError where `out` is one of these folders or lies in it, wherever symbolic links lead."""
    real = Path(os.path.realpath(out))
    for folder in folders:
        if real.is_relative_to(os.path.realpath(folder)):
            raise DataError(f"{out} is in {folder}, where images are looked for; name a folder outside of it")


def _list_folder(
    folder: Path, classes: list[str], out: Path, passed_over: Callable[[str, str], None]
) -> Iterator[ListedImage]:
    """The images of a split, sorted by class and name; what lies beside them is told to passed_over()."""
    for other in sorted(os.listdir(folder)):
        if other.startswith(".") or not (folder / other).is_dir():
            passed_over("beside the classes", str(folder / other))
    labels = {name: label for label, name in enumerate(classes)}
    names = _class_names(folder)
    _refuse_inside(out, (folder / name for name in names))  # a class may be a link that leads there
    for name in names:
        if name not in labels:
            raise DataError(f"{folder / name}: training has no class {name!r}; add it there, or take it away here")
    for name in tqdm(names, desc=f"listing {folder.name}", unit="class", disable=None):
        of_class = os.path.join(folder, name)
        there = sorted(os.listdir(of_class))
        files = [file for file in there if _is_image(file)]
        if not files:
            raise DataError(f"{of_class}: there are no images here (.jpg, .jpeg, .png or .webp); add some or delete it")
        for other in there:
            if not _is_image(other):
                passed_over(_kind(other), os.path.join(of_class, other))
        for file in files:
            path = os.path.join(of_class, file)
            size, changed = _measure(path)
            yield ListedImage(StoredImage(path, labels[name], size), f"{name}/{file}\0{changed}")


def _is_image(file: str) -> bool:
    return file.lower().endswith(SUFFIXES) and not file.startswith(".")  # macOS leaves ._NAME.jpg beside NAME.jpg


def _kind(file: str) -> str:
    """What a file that is no image is called where such files are counted."""
    suffix = os.path.splitext(file)[1].lower()
    return "of a hidden name" if file.startswith(".") else suffix or "without a suffix"


def _measure(path: str) -> tuple[int, int]:
    """Bytes of an image file, and the time of its last change in nanoseconds; follows symbolic links."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
    except OSError as error:
        raise DataError(f"{path}: this image cannot be read: {error.strerror or error}") from error
    if status.st_size == 0:
        raise DataError(f"{path}: this image is an empty file; replace or delete it")
    return status.st_size, status.st_mtime_ns
