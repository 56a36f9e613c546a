"""Numbers with units."""

from __future__ import annotations

import math

import pytest

from qsr_engine.config.strict import ConfigError
from qsr_engine.config.units import bytes_text, parse_count, parse_rate, parse_seconds, rate_text, seconds_text


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("25gbit", 25e9 / 8),
        ("25Gbit/s", 25e9 / 8),
        ("25gbps", 25e9 / 8),
        ("25 Gb/s", 25e9 / 8),
        ("100mbit", 100e6 / 8),
        ("100Mbits/s", 100e6 / 8),
        ("3.1GB/s", 3.1e9),
        ("3.1GBps", 3.1e9),
        ("1e3bytes/s", 1000.0),
        ("1KiB/s", 1024.0),
        ("2Mibit", 2 * 2**20 / 8),
        (".5gbit", 0.5e9 / 8),
        ("unlimited", math.inf),
        ("inf", math.inf),
    ],
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text, "--bandwidth") == pytest.approx(rate)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("25", "the unit is missing"),
        ("25g", "the unit is missing"),
        ("25gbots", "this is not a rate"),
        ("25ibit", "this is not a rate"),
        ("fast", "this is not a rate"),
        ("-1gbit", "this is not a rate"),
        ("0gbit", "a link of this rate moves nothing"),
        ("1e999gbit", "a link of this rate moves nothing"),
        ("", "this is not a rate"),
    ],
)
def test_rates_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"--bandwidth {text}: {words}"):
        parse_rate(text, "--bandwidth")


def test_times_and_counts() -> None:
    times = {"0.41": 0.41, "0.41s": 0.41, "410ms": 0.41, "50us": 5e-5, "50µs": 5e-5, "2 min": 120.0, "1h": 3600.0}
    assert {text: parse_seconds(text, "--latency") for text in times} == pytest.approx(times)
    counts = {"86567656": 86567656, "86.6e6": 86_600_000, "86.6M": 86_600_000, "7B": 7_000_000_000, "1": 1}
    assert {text: parse_count(text, "--parameters") for text in counts} == counts


@pytest.mark.parametrize("text", ["", "-1s", "1 day", "1x", "nan"])
def test_times_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--latency .*: this is not a time; write for example"):
        parse_seconds(text, "--latency")


@pytest.mark.parametrize("text", ["", "0", "-5", "0.2", "many", "1e300", "1e999"])
def test_counts_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--parameters .*: this is not a number of at least 1"):
        parse_count(text, "--parameters")


def test_what_is_printed_reads_back() -> None:
    for rate in (12.5e6, 3.125e9, 1.25e8, 40.0, 1e12, math.inf):
        assert parse_rate(rate_text(rate), "x") == pytest.approx(rate)
    for seconds in (0.0, 5e-5, 0.0123, 0.41, 75.0, 7200.0):
        assert parse_seconds(seconds_text(seconds), "x") == pytest.approx(seconds, rel=0.005)  # three digits
    assert [bytes_text(n) for n in (0, 999, 1500, 345.7e6, 30.33e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "345.7 MB",
        "30.33 TB",
    ]
