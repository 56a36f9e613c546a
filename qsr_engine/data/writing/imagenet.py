"""The archives in which ILSVRC2012 (ImageNet-1k) is distributed, read where they lie.

ILSVRC2012_img_train.tar holds a tar for each class, WNID.tar, with its images. ILSVRC2012_img_val.tar holds the
50,000 validation images, whose classes are in ILSVRC2012_devkit_t12.tar.gz. A tar has no table of contents, so all
headers are read once (no image is); afterwards every image is a place in a file, to be read in any order.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

from qsr_engine.config.extras import check_extra
from qsr_engine.data.errors import DataError
from qsr_engine.data.writing.stored import ListedImage, StoredImage

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def list_train(path: Path) -> tuple[list[str], Iterator[ListedImage]]:
    """The sorted WNIDs, which are the classes, and the images sorted by class and name.

    Raises:
        DataError: the archive cannot be read, is truncated, or is not a tar of tars.
    """
    found: dict[str, list[StoredImage]] = {}
    with _reading(path), open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as outer:
        for member in tqdm(outer, desc=f"listing {path.name}", unit="class", disable=None):
            wnid, suffix = os.path.splitext(os.path.basename(member.name))
            content = outer.extractfile(member) if member.isreg() and suffix == ".tar" else None
            if content is None:
                raise DataError(f"{path}: {member.name} is not the tar of a class; download {TRAIN} again")
            with tarfile.open(fileobj=content, mode="r:") as inner:
                images = [_source(path, image, member) for image in inner if image.isreg()]
                _check_end(inner, content, f"{path}: {member.name}")
            if not images:
                raise DataError(f"{path}: {member.name} has no images; download {TRAIN} again")
            found[wnid] = sorted(images, key=lambda source: source.member)
        _check_end(outer, stream, str(path))
    classes = sorted(found)
    if not classes:
        raise DataError(f"{path}: this archive is empty; download it again")
    changed = path.stat().st_mtime_ns
    images_of = (
        ListedImage(source._replace(label=label), f"{source.member}\0{changed}")
        for label, wnid in enumerate(classes)
        for source in found[wnid]
    )
    return classes, images_of


def list_val(path: Path, classes: list[str] | None) -> tuple[list[str], Iterator[ListedImage]]:
    """The classes, and the images sorted by name, which is the order of the devkit's labels.

    Args:
        classes: those of training; without any, all WNIDs of the devkit, sorted.
    Raises:
        DataError: as list_train(); the devkit is missing or does not fit; training lacks a class.
    """
    known, labels = _read_devkit(path.with_name(DEVKIT))
    classes = classes or sorted(known)
    with _reading(path), open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        members = tqdm(tar, desc=f"listing {path.name}", unit="image", disable=None)
        images = sorted((_source(path, member) for member in members if member.isreg()), key=lambda s: s.member)
        _check_end(tar, stream, str(path))
    if len(images) != len(labels):
        raise DataError(f"{path} has {len(images)} images, and {DEVKIT} has {len(labels)} labels; download both again")
    lacking = sorted(set(labels).difference(classes))
    if lacking:
        raise DataError(f"{path}: training has no class {lacking[0]!r}; add it there, or take {VAL} away")
    number_of = {wnid: label for label, wnid in enumerate(classes)}
    changed = path.stat().st_mtime_ns
    images_of = (
        ListedImage(source._replace(label=number_of[wnid]), f"{source.member}\0{changed}")
        for source, wnid in zip(images, labels, strict=True)
    )
    return classes, images_of


def _source(path: Path, image: tarfile.TarInfo, class_tar: tarfile.TarInfo | None = None) -> StoredImage:
    if image.size == 0:
        raise DataError(f"{path}: {image.name} is empty; download the archive again")
    offset = image.offset_data + (class_tar.offset_data if class_tar else 0)
    return StoredImage(str(path), 0, image.size, offset, image.name)


def _read_devkit(path: Path) -> tuple[list[str], list[str]]:
    """The WNIDs of all classes, and those of the validation images in their order."""
    if not path.is_file():
        raise DataError(f"{path} is missing, and it has the labels of {VAL}; download it, or take {VAL} away")
    check_extra("imagenet", "scipy", f"reading {path}")
    from scipy.io import loadmat  # half a second to import

    try:
        with tarfile.open(path, "r:gz") as tar:
            files = {os.path.basename(member.name): member for member in tar if member.isreg()}
            meta, truth = (
                tar.extractfile(files[name]).read()  # type: ignore[union-attr]
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # Synsets with children are inner nodes of WordNet's tree, not classes.
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}
        return list(wnids.values()), [wnids[int(number)] for number in truth.split()]
    except Exception as error:  # gzip, tarfile and scipy raise a dozen types between them
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: the validation labels cannot be read ({reason}); download it again") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or f"{error}; it is truncated or no tar file: download it again"
        raise DataError(f"{path}: this archive cannot be read: {reason}") from error


def _check_end(tar: tarfile.TarFile, stream: IO[bytes], where: str) -> None:
    """Raises DataError where no block of zeros follows the last member: tarfile takes whatever it is for the end."""
    members = tar.getmembers()
    data = members[-1].size if members else 0
    stream.seek(members[-1].offset_data + -(-data // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE if members else 0)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{where}: this archive is truncated or broken after {len(members)} members; download it again")
