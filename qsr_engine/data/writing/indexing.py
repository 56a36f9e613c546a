"""Make the index of shards that exist: which are there, of which split, and one pass over each of them."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import braceexpand
from tqdm import tqdm

from qsr_engine.config.strict import ConfigError, validate
from qsr_engine.data.errors import DataError, PassingError
from qsr_engine.data.index import INDEX_NAME, Index, Shard, Split, read_index
from qsr_engine.data.places import check_place, is_url
from qsr_engine.data.retrying import RETRY, retried
from qsr_engine.data.writing.counted import say_passed_over
from qsr_engine.data.writing.folder import refuse_data_set, write_index
from qsr_engine.data.writing.imagefolder import SPLIT_FOLDERS
from qsr_engine.data.writing.processes import run_jobs
from qsr_engine.data.writing.resuming import RECORD_NAME
from qsr_engine.data.writing.scanning import Scan, equal_neighbours, scan_shard, scan_stream
from qsr_engine.data.writing.verifying import raise_problems

INFO_NAMES = ("_info.json", "info.json")  # of the lists that timm reads, and that the sets of the Hugging Face hub have
FEW = 100  # samples; of fewer the order says nothing


class _ShardToIndex(NamedTuple):
    place: str  # folder or URL
    name: str
    classes: int | None
    rule: str


class _Indexed(NamedTuple):
    name: str
    scan: Scan
    equal: int  # samples whose label is that of the one before
    labels: Counter[int]


def index_shards(
    folder: str | Path,
    *,
    splits: Mapping[str, str] | None = None,
    label: str | None = None,
    out: str | Path | None = None,
    again: bool = False,
    processes: int = 1,
    say: Callable[[str], object] = print,
) -> Index:
    """Write index.json and samples.npy for tar shards that exist. Every shard is read once.

    Without `splits` an info.json or _info.json beside the shards says which there are; else folders train/, val/
    (validation/) and test/ do; else the names of the files: SPLIT-NUMBER.tar or SPLIT-NUMBER-of-NUMBER.tar.

    Class names are not known afterwards (None), so labels are not checked against them.

    Args:
        folder: or the URL of one, such as s3://bucket/set; then `out` is needed.
        splits: patterns of the shards of each split, with braces and * ? [..].
        label: where labels are: "cls" (the default), "txt", or "json:FIELD".
        out: the folder of the index, where it cannot be that of the shards.
        again: replace an index that is there, with its classes and splits.
        processes: number of processes that read.
        say: told what nothing reads, and of shards whose samples are in the order of their classes; a line each.
    Raises:
        DataError: there are no shards, a name has no split, a shard cannot be read or is empty, a sample has no image
            or no label (all of them are named, up to 100), there is an index already or it cannot be written, or the
            folder is not written to its end.
    """
    place, home = _places(folder, out)
    before = read_index(home) if again else None
    if before is None:
        refuse_data_set(home)
        if (home / RECORD_NAME).exists():
            raise DataError(
                f"{home} is not written to its end; run the command that began it again, it writes the index"
            )
    elif splits is None:
        place = before.place or place
    names, rule = _names(place, splits, before)
    entry = _checked(names, label or rule, place if out is not None else None, before)  # before the first is read
    found: dict[str, _Indexed] = {}
    shards = [name for of_split in names.values() for name in of_split]
    with tqdm(desc="reading", total=len(shards), unit="shard", disable=None) as bar:

        def take(indexed: _Indexed) -> None:
            found[indexed.name] = indexed
            bar.update()

        jobs = (_ShardToIndex(place, name, entry.class_count, entry.rule) for name in shards)
        run_jobs(_index_shard, jobs, max(1, min(processes, len(shards))), take)
    raise_problems([problem for name in shards for problem in found[name].scan.problems])
    say_passed_over([(name, found[name].scan.passed_over) for name in shards], say)
    of_splits = {name: [_entry(place, found[shard]) for shard in of_split] for name, of_split in names.items()}
    made = {
        name: Split(samples=sum(s.samples for s in of_split), shards=of_split) for name, of_split in of_splits.items()
    }
    _refuse_changed(made, before)
    for name, of_split in names.items():
        _say_order(name, [found[shard] for shard in of_split], home, say)
    try:
        home.mkdir(parents=True, exist_ok=True)
        return write_index(home, entry.model_copy(update={"splits": made}), (found[name].scan.rows for name in shards))
    except OSError as error:
        raise DataError(
            f"{home / INDEX_NAME}: this index cannot be written: {error.strerror or error}; mend that and run the same "
            "command again, or name another folder with --out"
        ) from error


def _places(folder: str | Path, out: str | Path | None) -> tuple[str, Path]:
    """Where the shards are, and the folder of the index."""
    place = str(folder).rstrip("/") or "/"
    if is_url(place):
        check_place(place)
        if out is None:
            raise DataError(f"{place}: an index cannot be written to a URL; name a folder for it with --out")
    elif out is not None:
        place = str(Path(place).absolute())
    return place, Path(place if out is None else out)


def _checked(names: Mapping[str, list[str]], label: str, place: str | None, before: Index | None) -> Index:
    """The index without its samples. Raises DataError for names and label rules that an index does not take."""
    for name in (name for of_split in names.values() for name in of_split):
        try:
            Shard(name=name, samples=1, bytes=1, sha256="0" * 64)
        except ValueError as error:
            raise DataError(f"the shard {name!r} cannot be indexed: its name has \\ : or ..; rename it") from error
    try:
        entry: dict[str, Any] = {"classes": before and before.classes, "splits": {}, "label": label, "place": place}
        if before is not None and before.text is not None:
            entry["text"] = before.text.model_dump()
        return validate(Index, {**entry, "place": place or (before and before.place)}, where="the index")
    except ConfigError as error:
        raise DataError(f"the label is {label!r}; write cls, txt, or json:FIELD ({error})") from error


def _names(place: str, splits: Mapping[str, str] | None, before: Index | None) -> tuple[dict[str, list[str]], str]:
    """The names of the shards of each split, and where their labels are."""
    if splits:
        names = {split: _matching(place, pattern) for split, pattern in splits.items()}
        rule = before.label if before else "cls"
    elif before is not None:
        return {name: [shard.name for shard in split.shards] for name, split in before.splits.items()}, before.label
    else:
        names, rule = _of_info(place) or (_of_names(place, _matching(place, "*.tar*", missing=False)), "cls")
    everything = [name for of_split in names.values() for name in of_split]
    twice = [name for name, count in Counter(everything).items() if count > 1]
    if twice:
        raise DataError(f"{place}: the shard {twice[0]!r} is in two splits; write patterns that do not overlap")
    if not everything:
        raise DataError(f"{place}: there are no tar shards here; expected files such as {place}/train-000000.tar")
    return names, rule


def _matching(place: str, pattern: str, *, missing: bool = True) -> list[str]:
    """The names of shards that a pattern names, sorted within each part of its braces."""
    names: list[str] = []
    for part in braceexpand.braceexpand(pattern):
        if is_url(place):
            from qsr_engine.data.remote import list_files  # fsspec takes a while to import

            found = list_files(place, part) if re.search(r"[*?\[]", part) else [part]
        else:
            try:
                found = sorted(path.relative_to(place).as_posix() for path in Path(place).glob(part))
            except (NotImplementedError, ValueError) as error:
                raise DataError(
                    f"{place}: the pattern {part!r} cannot be read: {error}; write it below the folder"
                ) from None
            if not found:
                _check_readable(place)
        names += [name for name in found if name not in names]
        if missing and not found:
            raise DataError(f"{place}: no file is named {part!r}; write the names of shards, with braces or *")
    packed = [name for name in names if re.search(r"\.(tgz|tar\.\w+)$", name)]
    if packed:
        raise DataError(
            f"{place}: {packed[0]!r} is a compressed archive; decompress it (images do not get smaller), and index the "
            ".tar"
        )
    return [name for name in names if missing or name.endswith(".tar")]


def _check_readable(place: str) -> None:
    try:
        os.listdir(place)
    except OSError as error:
        raise DataError(f"{place}: this folder cannot be read: {error.strerror}; name another one") from None


def _of_info(place: str) -> tuple[dict[str, list[str]], str] | None:
    """The shards that an info.json names; None where there is none."""
    for name in INFO_NAMES:
        content = _read(place, name)
        if content is None:
            continue
        try:
            found: dict[str, list[str]] = {}
            fields = set()
            for split, info in json.loads(content)["splits"].items():
                found[split] = [str(PurePosixPath(file)) for file in info["filenames"]]
                fields.add(info.get("alt_label") or "")
            (field,) = fields
            return {SPLIT_FOLDERS.get(split, split): files for split, files in found.items()}, (
                f"json:{field}" if field else "cls"
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{place}/{name}: it does not name shards as timm reads them ({error!r}); write --split NAME=PATTERN"
            ) from error
    return None


def _read(place: str, name: str) -> bytes | None:
    if not is_url(place):
        with suppress(OSError):
            return (Path(place) / name).read_bytes()
        return None
    from qsr_engine.data.remote import read_bytes
    from qsr_engine.data.retrying import Retry

    with suppress(DataError):
        return read_bytes(f"{place}/{name}", 1 << 26, Retry(0))
    return None


def _of_names(place: str, names: list[str]) -> dict[str, list[str]]:
    """The splits that folders, or the names of files, say."""
    folders = {
        split: found
        for folder, split in SPLIT_FOLDERS.items()
        if not names and (found := _matching(place, f"{folder}/*.tar*", missing=False))
    }
    if folders:
        return folders
    of_split: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.+?)-[0-9]+(-of-[0-9]+)?\.tar", name)
        # The rest is what an index takes for a name.
        if match is None or any(part in name for part in ("\\", ":", "..")) or not name.isprintable():
            raise DataError(
                f"{place}: the name {name!r} does not say its split; write --split train='*.tar', or rename the file "
                "as train-000000.tar or train-000000-of-000012.tar are named, without \\ : or .."
            )
        of_split.setdefault(match[1], []).append(name)
    return of_split


def _index_shard(job: _ShardToIndex) -> _Indexed:
    if is_url(job.place):
        from qsr_engine.data.remote import ShardStream

        url = f"{job.place}/{job.name}"

        def scan_once() -> Scan:
            with ShardStream(url, None) as stream:
                return scan_stream(url, stream, job.classes, rule=job.rule)  # type: ignore[arg-type]

        scan = retried(scan_once, RETRY)
    else:
        path = Path(job.place) / job.name
        try:
            scan = scan_shard(path, job.classes, rule=job.rule)
        except PassingError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise DataError(
                f"{path}: this shard cannot be read: {reason}; copy or write it again, or delete it"
            ) from error
    return _Indexed(job.name, scan, *equal_neighbours(scan.rows))


def _entry(place: str, indexed: _Indexed) -> Shard:
    name, scan = indexed.name, indexed.scan
    if scan.samples == 0:
        raise DataError(f"{place}/{name}: this shard has no samples; delete it")
    return Shard(name=name, samples=scan.samples, bytes=scan.bytes, sha256=scan.sha256)


def _refuse_changed(made: Mapping[str, Split], before: Index | None) -> None:
    """Raises DataError where shards are not those of the index that is made again."""
    was = {} if before is None else {s.name: s for split in before.splits.values() for s in split.shards}
    for shard in (shard for split in made.values() for shard in split.shards):
        if was.get(shard.name, shard) != shard:
            raise DataError(
                f"{shard.name}: this shard is not that of the index which is there; copy it again, or delete "
                f"{INDEX_NAME} to index what is there now"
            )


def _say_order(split: str, shards: Iterable[_Indexed], home: Path, say: Callable[[str], Any]) -> None:
    """Say where samples are in the order of their classes: neighbours have one label far more often than by chance."""
    equal = pairs = 0
    labels: Counter[int] = Counter()
    for shard in shards:
        equal, pairs = equal + shard.equal, pairs + shard.scan.samples - 1
        labels += shard.labels
    total = labels.total()
    if total < FEW or pairs < FEW // 2:
        return
    chance = sum((count / total) ** 2 for count in labels.values())
    if equal / pairs > (1 + chance) / 2 and chance < 0.9:
        say(
            f"split {split!r}: {100 * equal / pairs:.0f} % of neighbours have the same label, and {100 * chance:.0f} % "
            "would by chance: the samples are in the order of their classes, and local steps suffer most from that; "
            f"`qsr shards shuffle {home} OUT` writes them shuffled"
        )
