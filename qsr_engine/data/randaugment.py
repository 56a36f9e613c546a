"""RandAugment (Cubuk et al., arXiv 1909.13719) on pictures [S, S, 3]: torchvision's, and the one of the paper of QSR.

Both take N operations for each picture, each drawn anew from a list. They differ in the list and in its strength: the
largest rotation of magnitude 10 is 10 degrees for torchvision, whose scale ends at 30, and 29 for Composer, whose ends
at 10.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping
from itertools import chain
from random import Random
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import v2

from qsr_engine.config.recipe import RandAugmentConfig

try:
    from qsr_engine.data import _jpeg
except ImportError:  # it was not built: Pillow gives the same pixels, later
    FAST = False
else:
    FAST = True

Pixels = NDArray[np.uint8]
Values = tuple[float, ...]  # up to 7: which operation, of those in _pixels.c, and what it takes
Drawn = list[tuple["Operation", Any]]  # operations, and what was drawn for each


class Augment(Protocol):
    """Changes a picture, uint8 [S, S, 3] before and after."""

    of_torch: bool  # whether it draws from torch's global generator, not from `random`

    def __call__(self, picture: Pixels, random: Random) -> Pixels: ...


class Torchvision:
    """torchvision's RandAugment: 14 operations, identity among them, all of one magnitude.

    Args:
        operations: a picture's number of operations, N of the paper.
        magnitude: from 0 to 30, M of the paper.
    """

    of_torch = True

    def __init__(self, operations: int, magnitude: int) -> None:
        self.transform = v2.RandAugment(operations, magnitude)

    def __call__(self, picture: Pixels, random: Random) -> Pixels:
        # Of a Pillow image: of a tensor on the CPU these operations take three times as long.
        return np.asarray(self.transform(Image.fromarray(picture)))


class Composer:
    """RandAugment as the authors of QSR train with it: 13 operations, no identity, each of a strength drawn anew.

    The same pixels as MosaicML Composer 0.15.1's randaugment_image(severity, depth, augmentation_sets["all"]), which
    their rand_augment.py calls with 10 and 2. A level is drawn from U(0.1, severity), and 10 is the strongest:

        posterize                       4 - floor(0.4 level) bits are kept: 4 to 1
        solarize                        inverted from 256 - floor(25.6 level) on: 254 to 1
        rotate                          floor(3 level) degrees: 0 to 29, to both sides
        shear_x, shear_y                0.03 level: to 0.3, to both sides
        translate_x, translate_y        floor(S level / 30) pixels: to a third of the picture, to both sides
        color, contrast, sharpness      a factor, for one half from U(1, severity), else from U(1 - 0.09 severity, 1)
        brightness                      the same, and three quarters of what is above 1: 0.1 to 1, 0.75 to 7.5
        autocontrast, equalize          without a level

    What comes in from outside of the picture is black.

    Args:
        operations: a picture's number of operations, `depth`.
        magnitude: from 1 to 10, `severity`.
    """

    of_torch = False

    def __init__(self, operations: int, magnitude: int) -> None:
        self.operations, self.magnitude = operations, magnitude

    def __call__(self, picture: Pixels, random: Random) -> Pixels:
        return self.apply(picture, self.draw(random, len(picture)))

    def draw(self, random: Random, side: int) -> Drawn:
        """The operations for a picture of a side of so many pixels."""
        chosen = (_LIST[int(random.random() * len(_LIST))] for _ in range(self.operations))
        return [(operation, operation.draw(random, self.magnitude, side)) for operation in chosen]

    def apply(self, picture: Pixels, drawn: Drawn) -> Pixels:
        """The picture, changed: by compiled code where it is there, else by Pillow."""
        if FAST:
            changed = picture.copy()
            operations = array("d", chain.from_iterable(encoded(drawn, len(picture))))
            _jpeg.operate(changed, len(picture), operations)
            return changed
        image = Image.fromarray(picture)
        for operation, value in drawn:
            image = operation.apply(image, value)
        return np.asarray(image)


class Operation(NamedTuple):
    """What is drawn for a picture of a side of so many pixels, and what it does to the picture."""

    draw: Callable[[Random, float, int], Any]
    apply: Callable[[Image.Image, Any], Image.Image]
    encode: Callable[[Any, int], Values]  # its number in _pixels.c, and what it takes; of a side of so many pixels


AFFINE, MOVE, SHARPEN, COLOR, CONTRAST, BRIGHTNESS, AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE = range(10)
NO_OPERATION: Values = (-1, 0, 0, 0, 0, 0, 0)


def encoded(drawn: Drawn, side: int) -> list[Values]:
    """Operations on a picture of a side of so many pixels, as compiled code reads them."""
    found = (operation.encode(value, side) for operation, value in drawn)
    return [values + (0,) * (len(NO_OPERATION) - len(values)) for values in found]


def _level(random: Random, severity: float) -> float:
    return random.uniform(0.1, severity)


def _signed(value: float, random: Random) -> float:
    return -value if random.random() > 0.5 else value


def _nothing(random: Random, severity: float, side: int) -> None:
    return None


def _factor(random: Random, severity: float, side: int) -> float:
    return random.uniform(1, severity) if random.random() > 0.5 else random.uniform(1 - 0.09 * severity, 1)


def _brightness_factor(random: Random, severity: float, side: int) -> float:
    factor = _factor(random, severity, side)
    return 0.75 * factor if factor > 1 else factor


def _shear(random: Random, severity: float, side: int) -> float:
    return _signed(0.03 * _level(random, severity), random)


def _shift(random: Random, severity: float, side: int) -> int:
    return int(_signed(int(_level(random, severity) * (side / 3) / 10), random))


def _shear_by(across: float, down: float) -> Callable[[Image.Image, float], Image.Image]:
    def shear(image: Image.Image, slope: float) -> Image.Image:
        matrix = (1, slope * across, 0, slope * down, 1, 0)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR)

    return shear


def _rotate(image: Image.Image, degrees: int) -> Image.Image:
    """Around the centre, against the clock."""
    return image.rotate(degrees, resample=Image.Resampling.BILINEAR)


def _moved(image: Image.Image, dx: int, dy: int) -> Image.Image:
    """What was at (x + dx, y + dy) is at (x, y). Whole pixels need no filter."""
    return image.crop((dx, dy, image.width + dx, image.height + dy))


def _by(kind: int) -> Callable[[Any, int], Values]:
    return lambda value, _: (kind,) if value is None else (kind, value)


def _rotation(degrees: int, side: int) -> Values:
    angle, middle = math.radians(degrees), side / 2
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)  # as Pillow's rotate() has them
    across, down = middle - cos * middle + sin * middle, middle - sin * middle - cos * middle
    return (AFFINE, cos, -sin, across, sin, cos, down)


OPERATIONS: Mapping[str, Operation] = {
    "autocontrast": Operation(_nothing, lambda image, _: ImageOps.autocontrast(image), _by(AUTOCONTRAST)),
    "equalize": Operation(_nothing, lambda image, _: ImageOps.equalize(image), _by(EQUALIZE)),
    "posterize": Operation(
        lambda random, severity, _: 4 - int(_level(random, severity) * 4 / 10), ImageOps.posterize, _by(POSTERIZE)
    ),
    "rotate": Operation(
        lambda random, severity, _: _signed(int(_level(random, severity) * 30 / 10), random),
        _rotate,
        _rotation,
    ),
    "solarize": Operation(
        lambda random, severity, _: 256 - int(_level(random, severity) * 256 / 10), ImageOps.solarize, _by(SOLARIZE)
    ),
    "shear_x": Operation(_shear, _shear_by(1, 0), lambda slope, _: (AFFINE, 1, slope, 0, 0, 1, 0)),
    "shear_y": Operation(_shear, _shear_by(0, 1), lambda slope, _: (AFFINE, 1, 0, 0, slope, 1, 0)),
    "translate_x": Operation(_shift, lambda image, shift: _moved(image, shift, 0), lambda shift, _: (MOVE, shift, 0)),
    "translate_y": Operation(_shift, lambda image, shift: _moved(image, 0, shift), lambda shift, _: (MOVE, 0, shift)),
    "color": Operation(_factor, lambda image, factor: ImageEnhance.Color(image).enhance(factor), _by(COLOR)),
    "contrast": Operation(_factor, lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), _by(CONTRAST)),
    "brightness": Operation(
        _brightness_factor, lambda image, factor: ImageEnhance.Brightness(image).enhance(factor), _by(BRIGHTNESS)
    ),
    "sharpness": Operation(_factor, lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor), _by(SHARPEN)),
}
_LIST = list(OPERATIONS.values())


def make_augment(config: RandAugmentConfig | None) -> Augment | None:
    """The one that a recipe names; None without one."""
    if config is None:
        return None
    return (Composer if config.kind == "composer" else Torchvision)(config.operations, config.magnitude)
