"""Numbers with units, as they are written on a command line and printed: rates, durations, counts.

A unit decides by its spelling: `bit` and `b` are bits, `B` and `byte` are bytes. k, M, G, T are powers of 1000, and Ki,
Mi, Gi, Ti of 1024; the prefix may be written small or large, but for `m`, which is mega here and not milli.
"""

from __future__ import annotations

import math
import re

from qsr_engine.config.strict import ConfigError

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_PREFIXES |= {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "ns": 1e-9}
_NUMBER = r"([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)"
_RATE = re.compile(_NUMBER + r"\s*((?:[kKmMgGtT]i?)?)(bits?|bytes?|b|B)?(?:/s|ps)?")
UNLIMITED = ("unlimited", "inf")


def parse_rate(text: str, option: str) -> float:
    """Bytes a second from `25gbit`, `100mbit`, `25Gbit/s`, `3.1GB/s`; math.inf from `unlimited`.

    Raises:
        ConfigError: it is none of these, or 0.
    """
    if text.strip().lower() in UNLIMITED:
        return math.inf
    found = _RATE.fullmatch(text.strip())
    if found is None or found[3] is None:
        why = "the unit is missing" if found else "this is not a rate"
        raise ConfigError(f"{option} {text}: {why}; write for example 25gbit, 100mbit, 3.1GB/s or unlimited")
    bits = found[3].startswith("bit") or found[3] == "b"
    rate = float(found[1]) * _PREFIXES[found[2].lower()] / (8 if bits else 1)
    if not 0 < rate < math.inf:
        raise ConfigError(f"{option} {text}: a link of this rate moves nothing; write more than 0, or unlimited")
    return rate


def parse_seconds(text: str, option: str) -> float:
    """Seconds from `0.41`, `410ms`, `50us`, `2min`; a number without a unit is seconds.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(_NUMBER + r"\s*([a-zµ]*)", text.strip())
    unit = found[2] or "s" if found else ""
    if found is None or unit not in _SECONDS:
        raise ConfigError(f"{option} {text}: this is not a time; write for example 0.41s, 410ms or 50us")
    return float(found[1]) * _SECONDS[unit]


def parse_count(text: str, option: str) -> int:
    """A whole number of at least 1 from `86567656`, `86.6e6`, `86.6M`.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(_NUMBER + r"\s*([kKmMgGtTB]?)", text.strip())
    scale = {"B": 1e9} | {letter: _PREFIXES[letter.lower()] for letter in "kKmMgGtT"} | {"": 1.0}
    count = round(float(found[1]) * scale[found[2]]) if found and float(found[1]) < 1e18 else 0
    if count < 1:
        raise ConfigError(f"{option} {text}: this is not a number of at least 1; write for example 86.6e6 or 86.6M")
    return count


def counted(count: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def rate_text(rate: float) -> str:
    """A rate in bytes a second, as a network's is written."""
    if rate == math.inf:
        return "unlimited"
    bits = rate * 8
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits >= size:
            return f"{bits / size:.3g} {unit}" if bits < 1e12 else f"{bits / size:.0f} {unit}"
    return f"{bits:.3g} bit/s"


def seconds_text(seconds: float) -> str:
    """A duration with the unit that suits it."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us" if seconds else "0 s"


def bytes_text(count: float) -> str:
    """A number of bytes, in powers of 1000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.0f} B"
