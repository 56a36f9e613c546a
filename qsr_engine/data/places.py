"""Which places shards are read from: folders of this machine, and URLs of protocols that only read."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from qsr_engine.data.errors import DataError

# Protocols of data.shards: those that read files from elsewhere. fsspec knows others that run commands, read what a
# file of theirs points to, or reach into this machine.
PROTOCOLS = (
    *("http", "https", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "hf"),
    *("sftp", "ftp", "hdfs", "webhdfs"),
)


def is_url(place: str | Path) -> bool:
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
