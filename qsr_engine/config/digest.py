"""Nested plain values: in one number, in one level, and where two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any


def digest(config: Mapping[str, Any]) -> int:
    """A 63-bit digest of a configuration, the same on every rank that has the same one."""
    text = json.dumps(config, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path of the key, value) of nested mappings; an empty mapping is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(path of the key, value here, value there) of all that differs, by path; None stands for a missing key."""
    here, there = dict(flatten(one)), dict(flatten(other))
    keys = sorted({*here, *there})
    return [(key, here.get(key), there.get(key)) for key in keys if here.get(key) != there.get(key)]
