"""What do libraries take on one core to decode a JPEG, cut a crop out and resize it to 224 pixels, in memory?

    python -m benchmarks.loader.libraries --shards IMAGENET_SHARDS --out FOLDER

Of each picture the same random crop, the libraries in an order drawn anew in every round. The mean difference is
that from Pillow's picture with antialiasing, in levels of 255. A library that is not installed is left out: simplejpeg,
PyTurboJPEG, opencv-python-headless, torchcodec, spdl, nvidia-nvimgcodec-cu12.
"""

from __future__ import annotations

import os
import random
import statistics
import tarfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader.data import SIZE, Box, Pixels, random_box
from benchmarks.loader.pictures import picture_ours, picture_pillow, picture_tensor
from benchmarks.report import Report, parser, table

Way = Callable[[bytes, Box], Pixels]


def by_opencv(image: Pixels, box: Box) -> Pixels:
    """Its bilinear resize is not antialiased, and INTER_AREA is another filter; the former is the faster one."""
    import cv2  # type: ignore[import-not-found]

    left, top, width, height = box
    resized: Pixels = cv2.resize(image[top : top + height, left : left + width], (SIZE, SIZE))
    return resized


def opencv(jpeg: bytes, box: Box) -> Pixels:
    import cv2

    return by_opencv(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB), box)


def simplejpeg(jpeg: bytes, box: Box) -> Pixels:
    import simplejpeg as library  # type: ignore[import-not-found]

    return by_opencv(library.decode_jpeg(jpeg), box)


@cache
def turbo() -> Any:
    from turbojpeg import TurboJPEG  # type: ignore[import-not-found]

    return TurboJPEG()


def pyturbojpeg(jpeg: bytes, box: Box) -> Pixels:
    return by_opencv(turbo().decode(jpeg, pixel_format=0), box)


def torchcodec(jpeg: bytes, box: Box) -> Pixels:
    from torchcodec.decoders import decode_jpeg  # type: ignore[import-not-found]
    from torchvision.transforms.v2 import functional

    left, top, width, height = box
    image = decode_jpeg(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8))
    resized = functional.resized_crop(image, top, left, height, width, [SIZE, SIZE], antialias=True)
    return resized.permute(1, 2, 0).numpy()  # type: ignore[no-any-return]


def spdl(jpeg: bytes, box: Box) -> Pixels:
    import spdl.io as library  # type: ignore[import-not-found]

    left, top, width, height = box
    crop = f"crop={width}:{height}:{left}:{top}:exact=1,scale={SIZE}:{SIZE}:flags=bilinear,format=rgb24"
    return np.array(library.to_numpy(library.load_image(jpeg, filter_desc=crop)))


@cache
def codec() -> Any:
    from nvidia import nvimgcodec

    cpu = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
    return nvimgcodec, nvimgcodec.Decoder(backends=cpu, max_num_cpu_threads=1)


def nvimgcodec(jpeg: bytes, box: Box) -> Pixels:
    library, decoder = codec()
    left, top, width, height = box
    stream = library.CodeStream(jpeg).get_sub_code_stream(
        region=library.Region((top, left), (top + height, left + width))
    )
    return by_opencv(np.asarray(decoder.decode(stream).cpu()), (0, 0, width, height))


WAYS: dict[str, Way] = {
    "qsr_engine": picture_ours,
    "Pillow": picture_pillow,
    "torchvision decode_jpeg": picture_tensor,
    "torchcodec decode_jpeg, torchvision's resize": torchcodec,
    "opencv": opencv,
    "simplejpeg, opencv's resize": simplejpeg,
    "PyTurboJPEG, opencv's resize": pyturbojpeg,
    "SPDL (FFmpeg)": spdl,
    "nvImageCodec on the CPU, opencv's resize": nvimgcodec,
}
PACKAGES = ("pillow", "torch", "torchvision", "torchcodec", "opencv-python-headless", "simplejpeg", "PyTurboJPEG")


def pictures(shards: Path, count: int) -> list[tuple[bytes, Box]]:
    from PIL import Image

    draw = random.Random(0)
    found: list[tuple[bytes, Box]] = []
    for name in sorted(shards.glob("*.tar")):
        with tarfile.open(name) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                if member.name.endswith(".jpg") and stream and len(found) < count:
                    with Image.open(stream) as image:
                        if image.mode == "RGB":
                            stream.seek(0)
                            found.append((stream.read(), random_box(*image.size, draw)))
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--shards", type=Path, required=True)
    made.add_argument("--pictures", type=int, default=200)
    made.add_argument("--rounds", type=int, default=3)
    arguments = made.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    report = Report("loader-libraries", arguments, (*PACKAGES, "spdl", "nvidia-nvimgcodec-cu12", "numpy"))
    work = pictures(arguments.shards, arguments.pictures)
    rates: dict[str, list[float]] = {}
    problems, differences = {}, {}
    for name, way in WAYS.items():
        try:
            apart = [np.abs(way(*one).astype(int) - picture_pillow(*one)).mean() for one in work[:50]]
        except Exception as error:  # any library may be missing, or fail in its own way
            problems[name] = f"{type(error).__name__}: {error}"[:200]
        else:
            differences[name], rates[name] = float(np.mean(apart)), []
    for _ in range(arguments.rounds):
        for name in random.sample(list(rates), len(rates)):
            started = time.process_time()
            for one in work:
                WAYS[name](*one)
            rates[name].append(len(work) / (time.process_time() - started))
    rows = [
        [name, f"{statistics.median(found):,.0f}", f"{differences[name]:.3f}"]
        for name, found in sorted(rates.items(), key=lambda item: -statistics.median(item[1]))
    ]
    report.add(table(["library", "pictures/s of CPU time", "mean difference of 255"], rows))
    report.add("\n".join(f"{name}: {said}" for name, said in problems.items()))
    report.save(rates=rates, differences=differences, problems=problems)


if __name__ == "__main__":
    main()
