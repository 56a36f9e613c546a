"""The pictures of README.md: workers' timelines, and seconds of whole runs on slow networks.

    python -m docs.scripts.pictures      # in the repository's root

The timelines are those of the rule itself, on a run of 96 steps. The bars are the table of a committed report.
"""

from __future__ import annotations

import re
from pathlib import Path

from qsr_engine.config.qsr import LearningRateConfig, QSRConfig
from qsr_engine.schedule import learning_rate, rounds

PICTURES = Path(__file__).parents[1] / "pictures"
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


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for name, picture in (("timelines", timelines()), ("wallclock", wallclock())):
        (PICTURES / f"{name}.svg").write_text(picture, encoding="utf-8")
