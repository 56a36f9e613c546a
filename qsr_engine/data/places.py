"""Which places shards are read from: folders of this machine, and URLs of protocols that only read."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import braceexpand

from qsr_engine.data.errors import DataError

# Protocols of data.shards: those that read files from elsewhere. fsspec knows others that run commands, read what a
# file of theirs points to, or reach into this machine.
PROTOCOLS = (
    *("http", "https", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "hf"),
    *("sftp", "ftp", "hdfs", "webhdfs"),
)


Places = str | Path | Sequence[str]
"""A folder of shards, or the URL of one; or several, with braces and patterns (see expand_places)."""


def expand_places(places: Places) -> list[tuple[str, list[str] | None]]:
    """Folders and URLs, and for each the names of its shards where only some are meant.

    Braces make several names of one; on this host * ? [..] do too. A name that ends in .tar is one shard of the folder
    that it is in. What is there as it is written stays as it is.

    Raises:
        DataError: nothing is named so.
    """
    names: list[str] = []
    for text in [places] if isinstance(places, str | Path) else places:
        text = str(text)
        parts = [text] if os.path.exists(text) else list(braceexpand.braceexpand(text))
        for part in parts:
            if is_url(part) or not re.search(r"[*?\[]", part) or os.path.exists(part):
                names.append(part)
                continue
            found = sorted(glob.glob(part))
            if not found:
                raise DataError(f"{part}: no folder and no shard is named so; write names that are there")
            names += found
    of_folder: dict[str, list[str] | None] = {}
    for name in names:
        folder, sign, shard = name.rpartition("/")
        if not name.endswith(".tar") or (not is_url(name) and os.path.isdir(name)):
            of_folder[name] = None
        elif of_folder.setdefault(folder if sign else ".", []) is not None:
            of_folder[folder if sign else "."] += [shard]  # type: ignore[operator]
    return list(of_folder.items())


def is_url(place: Places) -> bool:
    """Whether a place is a URL and not a folder."""
    return isinstance(place, str) and "://" in place


def check_place(place: str) -> None:
    """Refuse places that would run a command, or lead to another place than they seem to.

    Raises:
        DataError: it is `pipe:`, a URL of a protocol that is not read here, or a chain of URLs.
    """
    protocol = re.split("://|::", place, maxsplit=1)[0]
    write = "write a folder, or a URL of " + ", ".join(f"{name}://" for name in PROTOCOLS)
    if place.lower().lstrip().startswith("pipe:"):
        raise DataError(f"{place}: `pipe:` would run a command, and none is run here; {write}")
    if not is_url(place):
        return
    if "::" in place:
        raise DataError(f"{place}: this is a chain of URLs, or an address of IPv6 in place of a name; {write}")
    if protocol.lower() in ("file", "local"):
        raise DataError(f"{place}: a folder of this machine is written without {protocol}://")
    if protocol.lower() not in PROTOCOLS:
        near = difflib.get_close_matches(protocol.lower(), PROTOCOLS, n=1)
        hint = f"; did you mean {near[0]}://?" if near else ""
        raise DataError(f"{place}: shards are not read by the protocol {protocol!r}{hint}; {write}")
