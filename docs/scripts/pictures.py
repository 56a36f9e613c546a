"""The pictures of README.md: workers' timelines, seconds of whole runs on slow networks, and error over averagings; and
error at a rate that is too large, of docs/when-qsr-wins.md.

    python -m docs.scripts.pictures      # in the repository's root

The timelines are those of the rule itself, on a run of 96 steps. The bars and the curves are those of committed
reports.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from benchmarks.frontier.statements import difference
from benchmarks.intervals import interval
from qsr_engine.config.qsr import LearningRateConfig, QSRConfig
from qsr_engine.schedule import learning_rate, rounds

PICTURES = Path(__file__).parents[1] / "pictures"
FRONTIER = Path(__file__).parents[2] / "benchmarks" / "results" / "frontier-2026-11-29-2.json"
REPORT = Path(__file__).parents[2] / "benchmarks" / "results" / "wallclock-2026-11-25.md"
WIDTH = 860
INK, GREY, LINE, LOCAL, BAR = "#1f2933", "#616e7c", "#cbd2d9", "#9ecae8", "#d1495b"


def _text(x: float, y: float, words: str, color: str = INK, size: int = 13, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" font-size="{size}" text-anchor="{anchor}">{words}</text>'


def _box(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"/>'


def _svg(height: int, alt: str, parts: list[str]) -> str:
    """White behind everything, so that it reads on a dark page too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{alt}" '
        f'font-family="system-ui, sans-serif">\n<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>\n'
    )
    return head + "\n".join(parts) + "\n</svg>\n"


def timelines() -> str:
    """Four workers over 96 steps: averaged at every step, and by the rule."""
    steps, left, top, lane = 96, 130.0, 100.0, 13.0
    rate = LearningRateConfig(schedule="cosine", peak=1.0, min=0.05)
    rule = QSRConfig(strategy="qsr", h_base=2, alpha=1.0, total_steps=steps, lr=rate)
    width = (WIDTH - left - 30) / steps
    curve = " ".join(f"{left + s * width:.1f},{82 - 40 * learning_rate(rate, s, steps):.1f}" for s in range(steps + 1))
    parts = [
        _text(20, 24, "K = 4 workers, 96 steps", GREY),
        _text(20, 66, "learning rate"),
        f'<polyline points="{curve}" fill="none" stroke="{INK}" stroke-width="2"/>',
    ]
    parallel = [(step, 1) for step in range(steps)]
    by_rule = [(one.start, one.length) for one in rounds(rule)]
    for name, found in (("data parallel", parallel), ("QSR", by_rule)):
        parts += [_text(20, top + 2 * lane, name), _text(20, top + 3.4 * lane, f"{len(found)} averagings", GREY, 12)]
        for start, length in found:
            x, end = left + start * width, left + (start + length) * width
            parts += [_box(x + 1, top + worker * (lane + 4), end - x - 3, lane, LOCAL) for worker in range(4)]
            parts.append(_box(end - 2, top - 3, 2.5, 4 * lane + 18, BAR))
            if name == "QSR":
                parts.append(_text((x + end) / 2, top + 4 * lane + 32, str(length), INK, 12, "middle"))
        top += 4 * lane + 40
    parts += [
        _text(20, top - 8, "period H"),
        _box(left, top + 8, 22, 11, LOCAL),
        _box(left + 260, top + 6, 2.5, 15, BAR),
    ]
    parts += [_text(left + 30, top + 18, "local steps: nothing crosses workers", GREY, 12)]
    parts += [
        _text(
            left + 272,
            top + 18,
            "averaging: of gradients (data parallel), of parameters (QSR)",
            GREY,
            12,
        )
    ]
    return _svg(int(top) + 34, "Workers' timelines under data parallel and under QSR", parts)


def measured() -> dict[tuple[int, str, str], dict[str, float]]:
    """(hosts, rate, model) -> run -> seconds as a multiple of those of compute alone, from the table of the report."""
    table: dict[tuple[int, str, str], dict[str, float]] = {}
    row = re.compile(r"\| (\d) \| (\w+) \| (\w+) \| ([^|]+) \| \d+ \| [\d.]+ \| ([\d.]+) \|")
    for hosts, rate, model, run, ratio in row.findall(REPORT.read_text(encoding="utf-8").split("## Where QSR")[0]):
        table.setdefault((int(hosts), rate, model), {})[run] = float(ratio)
    return table


def wallclock() -> str:
    """A bar a run, for the two models on two hosts, at each rate."""
    table, left, y = measured(), 190.0, 50.0
    runs = [
        ("qsr", "QSR", BAR),
        ("constant 4", "constant H = 4", "#e8a33d"),
        ("ddp", "torch DDP", LOCAL),
        ("parallel", "DeepSpeed data parallel", "#5a7fa3"),
    ]
    scale = (WIDTH - left - 70) / max(max(found.values()) for (hosts, _, _), found in table.items() if hosts == 2)
    parts = [_text(20, 26, "Seconds of a run, as a multiple of those of its compute alone. 2 hosts, gloo, CPUs", GREY)]
    for rate, words in (("100mbit", "100 Mbit/s"), ("1gbit", "1 Gbit/s"), ("unlimited", "no limit")):
        for model, name in (("vit", "ViT, 7.4 MB"), ("resnet", "ResNet, 11.3 MB")):
            parts += [_text(20, y + 20, name), _text(20, y + 37, words, GREY, 12)]
            for run, _, color in runs:
                ratio = table[2, rate, model][run]
                parts += [_box(left, y, ratio * scale, 12, color)]
                parts.append(_text(left + ratio * scale + 6, y + 10, f"{ratio:.2f}", INK, 11))
                y += 14
            y += 14
    parts.append(f'<path d="M{left + scale:.1f} 40V{y - 10:.1f}" stroke="{INK}" stroke-dasharray="3 3"/>')
    parts.append(_text(left + scale, y + 2, "compute alone", GREY, 11, "middle"))
    x = left
    for _, name, color in runs:
        parts += [_box(x, y + 14, 12, 12, color), _text(x + 18, y + 25, name, INK, 12)]
        x += 44 + 7 * len(name)
    return _svg(int(y) + 42, "Seconds of whole runs as a multiple of compute alone", parts)


CURVES = {
    "constant": ("constant H", "#b36b00"),
    "QSR": ("QSR", BAR),
    "power 3": ("power 3", "#7b4fa3"),
    "post_local": ("post-local SGD", "#2f7d4f"),
    "swap": ("SWAP", "#3f6f9f"),
}


def frontier() -> str:
    """Test error beside data parallel's over averagings, a curve a rule; bands are 95 % intervals."""
    rows = json.loads(FRONTIER.read_text(encoding="utf-8"))["rows"]["main"]
    left, right, top, bottom = 60.0, WIDTH - 200.0, 50.0, 330.0
    parallel = next(row for row in rows if row["rule"] == "parallel")
    most, least, low, high = 5.0, 0.2, -1.0, 0.5  # per cent of the steps; points

    def x(percent: float) -> float:
        return left + (right - left) * math.log(most / percent) / math.log(most / least)

    def y(points: float) -> float:
        return bottom - (bottom - top) * (points - low) / (high - low)

    words = "Points of test error beside data parallel's (digits, 8 workers, 30 trials, the rate tuned for each)"
    parts = [_text(20, 26, words, GREY)]
    for tick in (-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5):
        parts.append(f'<path d="M{left} {y(tick):.1f}H{right}" stroke="{LINE}" stroke-width="0.5"/>')
        parts.append(_text(left - 8, y(tick) + 4, f"{tick:+g}" if tick else "0", GREY, 11, "end"))
    for percent in (4, 2, 1, 0.5, 0.25):
        parts.append(_text(x(percent), bottom + 18, f"{percent:g}", GREY, 11, "middle"))
    words = "averagings in 100 steps, fewer to the right (data parallel: 100)"
    parts.append(_text((left + right) / 2, bottom + 38, words, GREY, 12, "middle"))
    parts.append(f'<path d="M{left} {y(0):.1f}H{right}" stroke="{INK}" stroke-width="1.5" stroke-dasharray="5 4"/>')
    key = [("data parallel", INK)]
    for rule, (name, color) in CURVES.items():
        own = sorted((row for row in rows if row["rule"] == rule), key=lambda row: -row["averagings_percent"])
        points = [(x(row["averagings_percent"]), *difference(row, parallel)) for row in own]
        line = " ".join(f"{place:.1f},{y(value):.1f}" for place, value, _ in points)
        if rule in ("constant", "QSR"):
            upper = [f"{place:.1f},{y(value + wide):.1f}" for place, value, wide in points]
            lower = [f"{place:.1f},{y(value - wide):.1f}" for place, value, wide in reversed(points)]
            parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{color}" opacity="0.15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{place:.1f}" cy="{y(value):.1f}" r="3" fill="{color}"/>' for place, value, _ in points]
        key.append((name, color))
    for number, (name, color) in enumerate(key):
        parts.append(_box(right + 30, top + 24 * number, 14, 4, color))
        parts.append(_text(right + 52, top + 24 * number + 7, name, INK, 13))
    return _svg(int(bottom) + 54, "Test error beside data parallel's over averagings, with 95 % intervals", parts)


def rates() -> str:
    """Test error of every rule at twice data parallel's best rate: a bar a rule, its 95 % interval over it."""
    rows = json.loads(FRONTIER.read_text(encoding="utf-8"))["rows"]["fixed"]
    own = [row for row in rows if row["problem"] == "4,000 steps, 2 times the rate"]
    names = {"parallel": "data parallel", "power 1": "power 1", **{rule: name for rule, (name, _) in CURVES.items()}}
    left, y, scale = 150.0, 46.0, (WIDTH - 270.0) / 60
    words = "Test error in % at twice data parallel's best rate (digits, 4,000 steps, 1 % of the averagings, 30 trials)"
    parts = [_text(20, 26, words, GREY)]
    for row in sorted(own, key=lambda one: interval(one["errors"]).mean):
        mean, half = interval(row["errors"])
        color = CURVES[row["rule"]][1] if row["rule"] in CURVES else INK if row["rule"] == "parallel" else GREY
        parts += [_text(20, y + 14, names[row["rule"]]), _box(left, y + 2, mean * scale, 15, color)]
        low, high = left + (mean - half) * scale, left + (mean + half) * scale
        parts.append(f'<path d="M{low:.1f} {y + 9.5:.1f}H{high:.1f}" stroke="{INK}" stroke-width="2"/>')
        parts.append(_text(high + 8, y + 14, f"{mean:.1f} (H at the peak: {row['period_at_peak']})", INK, 12))
        y += 24
    return _svg(int(y) + 14, "Test error at a peak rate that is twice too large, by rule, with 95 % intervals", parts)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    drawn = {"timelines": timelines(), "wallclock": wallclock(), "frontier": frontier(), "rates": rates()}
    for name, picture in drawn.items():
        (PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")
