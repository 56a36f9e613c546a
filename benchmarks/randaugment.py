"""What does RandAugment cost a picture: the authors' of QSR (`kind: composer`) beside torchvision's, both as (2, 10)?

    python -m benchmarks.randaugment --out FOLDER
    python -m benchmarks.randaugment --sheet docs/randaugment.png     # what each operation does; nothing is measured

One core, one process: the CPU time of 224-pixel pictures of two photographs that come with scikit-learn. In every
repetition each way is measured once, in an order drawn anew; the tables give medians, and a ratio is the median over
repetitions of the ratio within one, so that load from elsewhere slows both. "by Pillow" is what runs where
compiled code (`qsr_engine/data/_pixels.c`) is not there.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from benchmarks.report import Report, parser, table
from qsr_engine.data import randaugment
from qsr_engine.data.randaugment import OPERATIONS, Composer, Pixels, Torchvision

SIDE = 224
SHOWN = 88  # pixels of a picture in the sheet
SHARES = (0.0, 0.25, 0.5, 0.75, 0.999)  # of the range that a level is drawn from


def pictures() -> list[Pixels]:
    boxes = {"china.jpg": (100, 0, 527, 427), "flower.jpg": (130, 0, 557, 427)}
    photographs = {name: Image.fromarray(load_sample_image(name)).crop(box) for name, box in boxes.items()}
    return [np.asarray(photograph.resize((SIDE, SIDE))) for photograph in photographs.values()]


class AtShare(random.Random):
    """Each uniform draw is this share of its range, and each coin falls as `coin` says."""

    def __init__(self, share: float, coin: float) -> None:
        super().__init__()
        self.share, self.coin = share, coin

    def uniform(self, a: float, b: float) -> float:
        return a + self.share * (b - a)

    def random(self) -> float:
        return self.coin


def sheet(path: Path) -> None:
    """Each operation of `kind: composer` at magnitude 10: five levels, weakest to strongest, for both signs."""
    margin, line = 96, SHOWN + 4
    columns = [(share, coin) for coin in (0.1, 0.9) for share in SHARES]
    image = Image.new("RGB", (margin + line * len(columns), line * len(OPERATIONS)), "white")
    write = ImageDraw.Draw(image)
    source = pictures()[1]
    for row, (name, operation) in enumerate(OPERATIONS.items()):
        write.text((4, row * line + SHOWN // 2), name, fill="black")
        for column, (share, coin) in enumerate(columns):
            value = operation.draw(AtShare(share, coin), 10, SIDE)
            shown = operation.apply(Image.fromarray(source), value).resize((SHOWN, SHOWN))
            place = (margin + column * line, row * line)
            image.paste(shown, place)
            if value is not None:
                words = f"{value:.2f}" if isinstance(value, float) else str(value)
                write.text(
                    (place[0] + 3, place[1] + SHOWN - 13), words, fill="white", stroke_width=1, stroke_fill="black"
                )
    image.quantize(96).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


def milliseconds(way: Callable[[Pixels], object], count: int) -> float:
    """CPU time of a picture."""
    inputs = pictures()
    started = time.process_time()
    for number in range(count):
        way(inputs[number % len(inputs)])
    return 1000 * (time.process_time() - started) / count


def measure(repetitions: int, count: int, ways: dict[str, Callable[[Pixels], object]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name in random.sample(list(ways), len(ways)):
            found[name].append(milliseconds(ways[name], count))
    return found


def by_pillow(augment: Composer, draws: random.Random) -> Callable[[Pixels], object]:
    def way(picture: Pixels) -> object:
        fast, randaugment.FAST = randaugment.FAST, False
        try:
            return augment(picture, draws)
        finally:
            randaugment.FAST = fast

    return way


def rows(found: dict[str, list[float]], beside: str) -> list[list[str]]:
    ratios = {
        name: statistics.median(one / other for one, other in zip(found[name], found[beside], strict=True))
        for name in found
    }
    return [[name, f"{statistics.median(found[name]):.3f}", f"{ratios[name]:.2f}"] for name in found]


def run(arguments: argparse.Namespace) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = Report("randaugment", arguments, ("pillow", "torch", "torchvision", "numpy"), compiled=randaugment.FAST)
    draws, ours, theirs = random.Random(0), Composer(2, 10), Torchvision(2, 10)
    ways: dict[str, Callable[[Pixels], object]] = {
        "torchvision, RandAugment(2, 10)": lambda picture: theirs(picture, draws),
        "composer (2, 10)": lambda picture: ours(picture, draws),
        "composer (2, 10), by Pillow": by_pillow(ours, draws),
    }
    whole = measure(arguments.repetitions, arguments.pictures, ways)
    report.add(table(["way", "ms a picture", "x torchvision"], rows(whole, next(iter(ways)))))
    ways = {
        name: lambda picture, operation=operation: ours.apply(  # type: ignore[misc]
            picture, [(operation, operation.draw(draws, 10, SIDE))]
        )
        for name, operation in OPERATIONS.items()
    }
    single = measure(max(1, arguments.repetitions // 4), arguments.pictures // 4, ways)
    report.add(table(["operation", "ms a picture"], [row[:2] for row in rows(single, "rotate")]))
    report.save(milliseconds={**whole, **single})


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--repetitions", type=int, default=20)
    made.add_argument("--pictures", type=int, default=200, help="of a way in a repetition")
    made.add_argument("--sheet", type=Path, metavar="FILE", help="draw the picture sheet instead")
    arguments = made.parse_args()
    if arguments.sheet:
        sheet(arguments.sheet)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
