"""Headers of images: what the index keeps of them is what decoders find, and is not read again."""

from __future__ import annotations

import importlib
import random
import types

import numpy as np
import pytest

from qsr_engine.data import decoding
from qsr_engine.data.decoding import Decoder, image_size
from qsr_engine.data.rows import Header, header_of
from qsr_engine.data.views import TrainView
from tests.support.pictures import encode, photo

_PHOTO = photo().crop((0, 0, 150, 101))
OF_EVERY_KIND = {
    **{f"4:{n}": encode(_PHOTO, "JPEG", subsampling=n) for n in range(3)},
    "grey": encode(_PHOTO.convert("L"), "JPEG"),
    "progressive": encode(_PHOTO, "JPEG", progressive=True),
    "optimised": encode(_PHOTO, "JPEG", optimize=True, restart_marker_rows=1),
    "rgb inside": encode(_PHOTO, "JPEG", keep_rgb=True),
    "cmyk": encode(_PHOTO.convert("CMYK"), "JPEG"),
    "png": encode(_PHOTO),
    "webp": encode(_PHOTO, "WEBP"),
}
OF_EVERY_KIND["cut"] = OF_EVERY_KIND["4:0"]._replace(image=OF_EVERY_KIND["4:0"].image[:-2])


@pytest.mark.skipif(not decoding.REGIONS, reason="needs the extension")
@pytest.mark.parametrize("kind", OF_EVERY_KIND)
def test_the_index_and_the_decoder_have_one_rule(kind: str) -> None:
    sample = OF_EVERY_KIND[kind]
    assert header_of(sample.image) == image_size(sample)


def test_a_header_that_the_index_has_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample for kind, sample in OF_EVERY_KIND.items() if kind != "cut"]
    decoder = Decoder(32, TrainView(32, "crop_flip"))
    found = np.zeros((2, len(samples), 32, 32, 3), np.uint8)
    assert not decoder.decode(samples, random.Random(0), found[0])
    known = [sample._replace(header=header_of(sample.image)) for sample in samples]
    monkeypatch.setattr(decoding, "_size_by_pillow", None)
    if decoding.REGIONS:
        compiled = importlib.import_module("qsr_engine.data._jpeg")
        monkeypatch.setattr(decoding, "_jpeg", types.SimpleNamespace(decode_batch=compiled.decode_batch))
    assert not decoder.decode(known, random.Random(0), found[1])
    assert np.array_equal(*found)


def test_an_image_that_is_not_the_one_of_the_index_is_bad() -> None:
    decoder, out = Decoder(32, TrainView(32, "none")), np.zeros((2, 32, 32, 3), np.uint8)
    wrong = [encode(_PHOTO)._replace(header=Header(150, 90, False)), encode(_PHOTO, "JPEG")]
    wrong[1] = wrong[1]._replace(header=Header(160, 120, True))
    bad = decoder.decode(wrong, random.Random(0), out)
    assert "has 150 x 101 pixels, and its index says 150 x 90; `qsr shards index DIR --again`" in str(bad[0])
    assert "has 150 x 101 pixels, and its index says 160 x 120" in str(bad[1])
