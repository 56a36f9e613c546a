"""RandAugment as the authors of QSR train with it: what each operation does, how far, and how often."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from functools import partial
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from pydantic import ValidationError

from benchmarks.randaugment import AtShare
from qsr_engine.config.recipe import RandAugmentConfig
from qsr_engine.data import randaugment
from qsr_engine.data.randaugment import OPERATIONS, Composer, Pixels, Torchvision, make_augment
from tests.support.pictures import photo

S = 224


def picture() -> Image.Image:
    return photo().crop((60, 20, 480, 420)).resize((S, S))


BELOW = 1 - 1e-9
LEAST, MOST = AtShare(0, 0.1), AtShare(BELOW, 0.1)  # the coin gives positive signs, and factors below 1
OTHER_LEAST, OTHER_MOST = AtShare(1e-6, 0.9), AtShare(BELOW, 0.9)  # negative signs, and factors above 1


def done(name: str, image: Image.Image, random: Random, magnitude: int = 10) -> Pixels:
    return changed(name, image, OPERATIONS[name].draw(random, magnitude, image.width))


def changed(name: str, image: Image.Image, value: object) -> Pixels:
    return Composer(1, 10).apply(np.asarray(image), [(OPERATIONS[name], value)])


def drawn(values: np.ndarray) -> Image.Image:
    """A grey picture of one row of values, repeated."""
    return Image.fromarray(np.repeat(np.tile(values.astype(np.uint8), (len(values), 1))[:, :, None], 3, axis=2))


RAMP = drawn(np.arange(256))


@pytest.mark.parametrize(("random", "bits"), [(LEAST, 4), (MOST, 1)])
def test_posterize(random: Random, bits: int) -> None:
    assert len(np.unique(done("posterize", RAMP, random))) == 2**bits


@pytest.mark.parametrize(("random", "first"), [(LEAST, 254), (MOST, 1)])
def test_solarize(random: Random, first: int) -> None:
    row = done("solarize", RAMP, random)[0, :, 0]
    assert row.tolist() == [value if value < first else 255 - value for value in range(256)]


@pytest.mark.parametrize(
    ("random", "degrees"), [(LEAST, 0), (OTHER_LEAST, 0), (MOST, 29), (OTHER_MOST, -29), (AtShare(0.5, 0.1), 15)]
)
def test_rotate(random: Random, degrees: float) -> None:
    """The direction of a bar, from the moments of its pixels; against the clock is positive, and y points down."""
    pixels = np.zeros((S, S, 3), np.uint8)
    pixels[110:114, 40:184] = 255
    weights = done("rotate", Image.fromarray(pixels), random)[:, :, 0].astype(float)
    y, x = np.mgrid[:S, :S] - (S - 1) / 2
    found = -math.degrees(0.5 * math.atan2(2 * (weights * x * y).sum(), (weights * (x * x - y * y)).sum()))
    assert found == pytest.approx(degrees, abs=0.1)


@pytest.mark.parametrize(("random", "most"), [(LEAST, 0.003), (MOST, 0.3), (OTHER_MOST, -0.3)])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_shear(axis: str, random: Random, most: float) -> None:
    """Where a bar lies in each row, against the row: the slope."""
    pixels = np.zeros((S, S, 3), np.uint8)
    pixels[:, 100:104] = 255
    pixels = pixels if axis == "x" else pixels.transpose(1, 0, 2)
    found = done(f"shear_{axis}", Image.fromarray(pixels), random)[:, :, 0].astype(float)
    found = found if axis == "x" else found.T
    places = (found * np.arange(S)).sum(1) / found.sum(1)
    assert np.polyfit(np.arange(S), places, 1)[0] == pytest.approx(-most, abs=2e-3)


@pytest.mark.parametrize(("random", "pixels"), [(LEAST, 0), (MOST, 74), (OTHER_MOST, -74)])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_translate(axis: str, random: Random, pixels: int) -> None:
    """A third of 224 is 74.67; what comes in is black."""
    image = np.full((S, S, 3), 9, np.uint8)
    image[100, 100] = 200
    found = done(f"translate_{axis}", Image.fromarray(image), random)
    assert np.argwhere(found[:, :, 0] == 200).tolist() == [[100, 100 - pixels] if axis == "x" else [100 - pixels, 100]]
    assert (found == 0).sum() == abs(pixels) * S * 3


FACTORS = [(LEAST, 0.1), (MOST, 1.0), (OTHER_LEAST, 1.0), (OTHER_MOST, 10.0)]


@pytest.mark.parametrize(("random", "factor"), FACTORS)
def test_enhancing(random: Random, factor: float) -> None:
    """The distance from black, the mean grey, grey, and the smoothed picture is multiplied, where none is cut off."""
    level = 20 if factor <= 1 else 10
    brightness = done("brightness", Image.new("RGB", (S, S), (level,) * 3), random)
    assert brightness[0, 0].tolist() == [int(level * (0.75 * factor if random.random() > 0.5 else factor) + 1e-4)] * 3

    two = drawn(np.repeat([123, 133], S // 2))
    assert done("contrast", two, random)[0, [0, -1], 0].tolist() == pytest.approx(
        [128 - 5 * factor, 128 + 5 * factor], abs=1
    )

    grey = 120 + 0.299 * 10
    color = done("color", Image.new("RGB", (S, S), (130, 120, 120)), random)[0, 0]
    assert color.tolist() == pytest.approx([grey + factor * (130 - grey), *[grey + factor * (120 - grey)] * 2], abs=6)

    spot = np.full((S, S, 3), 100, np.uint8)
    spot[50, 50] = 113
    sharp = done("sharpness", Image.fromarray(spot), random)
    assert sharp[50, 50].tolist() == pytest.approx([105 + factor * 8] * 3, abs=1)
    assert sharp[50, 51].tolist() == pytest.approx([101 - factor] * 3, abs=1)


def test_a_smaller_magnitude_is_weaker() -> None:
    assert len(np.unique(done("posterize", RAMP, MOST, 5))) == 2**3
    grey = Image.new("RGB", (S, S), (100, 100, 100))
    assert done("brightness", grey, AtShare(0, 0.1), 5)[0, 0, 0] == 55
    assert len(np.unique(done("posterize", RAMP, MOST, 1))) == 2**4


def plainly(name: str, image: Image.Image, value: float) -> Image.Image:
    """What Composer calls, written with Pillow's own functions."""
    enhance = {"color": ImageEnhance.Color, "contrast": ImageEnhance.Contrast, "brightness": ImageEnhance.Brightness}
    matrices = {
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, value, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, value),
    }
    if name in matrices:
        return image.transform(image.size, Image.Transform.AFFINE, matrices[name], resample=Image.Resampling.BILINEAR)
    if name == "rotate":
        return image.rotate(value, resample=Image.Resampling.BILINEAR)
    if name in ("autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)  # type: ignore[no-any-return]
    if name in ("posterize", "solarize"):
        return getattr(ImageOps, name)(image, int(value))  # type: ignore[no-any-return]
    return {**enhance, "sharpness": ImageEnhance.Sharpness}[name](image).enhance(value)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_pixels_are_pillows(name: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fast and not randaugment.FAST:
        pytest.skip("_jpeg was not built")
    monkeypatch.setattr(randaugment, "FAST", fast)
    random, image = Random(5), picture()
    for side in (S, 31):
        image = image.resize((side, side))
        for _ in range(8):
            value = OPERATIONS[name].draw(random, 10, side)
            assert np.array_equal(changed(name, image, value), np.asarray(plainly(name, image, value))), value


def test_every_rotation_and_hard_histograms_are_pillows() -> None:
    """Of all degrees; of pictures of one value, of two, of few pixels each, and of a step of one in equalize."""
    small = picture().resize((32, 32))
    for degrees in range(-29, 30):
        assert np.array_equal(changed("rotate", small, degrees), np.asarray(plainly("rotate", small, degrees))), degrees
    generator = np.random.default_rng(0)
    for values in ([7], [0, 255], [3, 4], [250, 255], range(256), [*range(200), 255]):
        for side in (1, 2, 5, 16, 22, 33):
            image = Image.fromarray(generator.choice(list(values), (side, side, 3)).astype(np.uint8))
            for name in ("autocontrast", "equalize", "contrast", "color"):
                found = changed(name, image, 1.7)
                assert np.array_equal(found, np.asarray(plainly(name, image, 1.7))), (name, values, side)


def test_operations_that_are_none() -> None:
    _jpeg = pytest.importorskip("qsr_engine.data._jpeg", reason="it was not built")

    def operate(side: int, *operation: float) -> bytes:
        pixels = bytearray(b"\x07" * 12)
        _jpeg.operate(pixels, side, array("d", operation))
        return bytes(pixels)

    assert operate(2, randaugment.AFFINE, 1, 0, 0, 0, 1, 0) == b"\x07" * 12
    for side in (0, 1, 3, -2, 2**30):
        with pytest.raises(ValueError, match="has 3 bytes each, and 12 bytes were given"):
            operate(side, randaugment.AFFINE, 1, 0, 0, 0, 1, 0)
    for huge in (math.nan, math.inf, 1e300):
        assert operate(2, randaugment.AFFINE, 1, huge, huge, huge, 1, 0) == bytes(12)
    for wrong in ((10, 0), (-2, 0), (math.nan, 0), (1, 3), (1, math.nan), (8, 9), (8, -1), (9, 257), (9, math.inf)):
        with pytest.raises(ValueError, match="there is no such operation"):
            operate(2, *wrong, 0, 0, 0, 0, 0)


def test_levels_are_uniform_and_signs_even() -> None:
    """Of 20,000 draws; a share has a standard error of at most 0.0036."""
    random, draws = Random(1), 20_000

    def shares(name: str) -> dict[float, float]:
        counts = Counter(OPERATIONS[name].draw(random, 10, S) for _ in range(draws))
        return {value: count / draws for value, count in counts.items()}

    width = 2.5 / 9.9
    bits = shares("posterize")
    assert set(bits) == {4, 3, 2, 1}
    assert [bits[n] for n in (4, 3, 2, 1)] == pytest.approx([2.4 / 9.9, width, width, width], abs=0.015)
    degrees = shares("rotate")
    assert set(degrees) == set(range(-29, 30))
    assert degrees[0] == pytest.approx(0.2333 / 9.9, abs=0.006)
    assert sum(share for value, share in degrees.items() if value < 0) == pytest.approx(0.4882, abs=0.015)
    assert {abs(shift) for shift in shares("translate_x")} == set(range(75))
    assert set(shares("solarize")) == set(range(1, 255))
    for name, most in (("color", 10), ("contrast", 10), ("sharpness", 10), ("brightness", 7.5)):
        factors = np.array([OPERATIONS[name].draw(random, 10, S) for _ in range(draws)])
        above = factors[factors > (0.75 if name == "brightness" else 1)]
        assert factors.min() == pytest.approx(0.1, abs=0.01)
        assert factors.max() == pytest.approx(most, abs=0.01)
        quarter = 0.25 / 1.8 if name == "brightness" else 0  # of the draws from 0.1 to 1, those above 0.75
        assert len(above) / draws == pytest.approx(0.5 + quarter, abs=0.015)


def test_each_operation_is_drawn_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    def seeing(name: str, image: Image.Image, _: float) -> Image.Image:
        seen[name] += 1
        return image

    spies = [operation._replace(apply=partial(seeing, name)) for name, operation in OPERATIONS.items()]
    monkeypatch.setattr(randaugment, "FAST", False)
    monkeypatch.setattr(randaugment, "_LIST", spies)
    augment, random, small = Composer(2, 10), Random(2), np.zeros((2, 2, 3), np.uint8)
    for _ in range(6500):
        augment(small, random)
    assert set(seen) == set(OPERATIONS)
    assert len(seen) == 13
    assert all(count == pytest.approx(1000, abs=120) for count in seen.values()), "31 is one standard error"


def test_a_recipe_names_it() -> None:
    assert isinstance(make_augment(RandAugmentConfig()), Torchvision)
    composer = make_augment(RandAugmentConfig(kind="composer", operations=3, magnitude=7))
    assert isinstance(composer, Composer)
    assert (composer.operations, composer.magnitude) == (3, 7)
    assert make_augment(None) is None
    with pytest.raises(ValidationError, match="magnitude is 11 and kind is 'composer', whose magnitudes are 1 to 10"):
        RandAugmentConfig(kind="composer", magnitude=11)
