"""Which part of an image becomes which part of a picture: pure functions of its size and of random numbers.

A `View` is all that decoding needs to know, so that only the pixels of the crop are decoded, by whatever decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import NamedTuple

SMALL = 64  # pixels of the short side; images up to here are shown whole, as is usual for CIFAR and digits
SCALE = (0.08, 1.0)  # of the image's area, and
RATIO = (3 / 4, 4 / 3)  # of width to height: the random crops of Inception and of torchvision's RandomResizedCrop
_LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))
EVAL_MARGIN = 256 / 224  # the usual margin at evaluation on ImageNet


class View(NamedTuple):
    """The box of the source that is resized to a square, and where the square lies in the picture.

    `left`, `top`, `width` and `height` are in pixels of the source, not always whole. With `context`, resizing sees
    pixels around the box, as if the whole image were resized and cropped then; without, as if the box were cut out
    first. `dx` and `dy` move the square to the right and down; what is moved in is black.
    """

    left: float
    top: float
    width: float
    height: float
    context: bool = False
    dx: int = 0
    dy: int = 0
    flip: bool = False


ChooseView = Callable[[int, int, Random], View]
"""From width and height of the source in pixels, and random numbers, to a view."""


class TrainView:
    """The views of training.

    "none" resizes the short side to S and crops the centre. "crop" takes a random crop of random area and aspect
    ratio, resized to S; an image whose short side has at most 64 pixels is resized as for "none" and moved by up to
    S / 8 pixels each way. "crop_flip" is "crop" and, for half of the images, a horizontal flip.

    Args:
        size: S, the side of the picture in pixels.
    """

    def __init__(self, size: int, augment: str) -> None:
        self.size, self.crop, self.flip = size, augment != "none", augment == "crop_flip"

    def __call__(self, width: int, height: int, random: Random) -> View:
        if not self.crop:
            view = centre(width, height, self.size, self.size)
        elif min(width, height) <= SMALL:
            pad = self.size // 8
            view = centre(width, height, self.size, self.size)
            view = view._replace(dx=random.randint(-pad, pad), dy=random.randint(-pad, pad))
        else:
            view = random_crop(width, height, random)
        return view._replace(flip=True) if self.flip and random.random() < 0.5 else view


class EvalView:
    """The view of evaluation, always the same.

    The short side is resized to S * 256 / 224 and the centre is cropped; an image whose short side has at most 64
    pixels is resized to S without a margin.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, width: int, height: int, random: Random) -> View:
        short = self.size if min(width, height) <= SMALL else round(self.size * EVAL_MARGIN)
        return centre(width, height, short, self.size)


def centre(width: int, height: int, short: int, size: int) -> View:
    """The box that a resize of the short side to `short` and a centre crop of `size` pixels show.

    Sides are rounded as torchvision's Resize and CenterCrop round them.
    """
    if width <= height:
        across, down = short, int(short * height / width)
    else:
        across, down = int(short * width / height), short
    left, top = round((across - size) / 2), round((down - size) / 2)
    x, y = width / across, height / down
    return View(left * x, top * y, size * x, size * y, context=True)


def random_crop(width: int, height: int, random: Random) -> View:
    """A crop of random area (SCALE) and aspect ratio (RATIO), at a random place.

    Where ten draws do not fit into the image, the largest centre crop whose ratio is allowed. As torchvision's
    RandomResizedCrop.
    """
    area, draw = width * height, random.random
    for _ in range(10):
        target = area * (SCALE[0] + (SCALE[1] - SCALE[0]) * draw())
        ratio = math.exp(_LOG_RATIO[0] + (_LOG_RATIO[1] - _LOG_RATIO[0]) * draw())
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return View(int((width - w + 1) * draw()), int((height - h + 1) * draw()), w, h)
    w, h = width, height
    if width / height < RATIO[0]:
        h = min(height, max(1, round(width / RATIO[0])))
    elif width / height > RATIO[1]:
        w = min(width, max(1, round(height * RATIO[1])))
    return View((width - w) // 2, (height - h) // 2, w, h)
