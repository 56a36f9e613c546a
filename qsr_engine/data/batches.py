"""Batches: samples are decoded into one block of memory, and good ones stand in for bad ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qsr_engine.data.decoding import Pixels
from qsr_engine.data.errors import DataError
from qsr_engine.data.samples import Loaded


class ImageBatch(NamedTuple):
    """Pictures and labels.

    `images` are uint8 [B, 3, S, S] in channels-last memory, RGB. `labels` are int64 [B]; -1 marks a picture that
    evaluation leaves out. `skipped` says for each bad sample of the batch what was wrong with it. Of a text, `images`
    are the bytes of its tokens, uint8 [B, bytes of a block's], and labels are 0.
    """

    images: Tensor
    labels: Tensor
    skipped: tuple[str, ...] = ()


class Decodes(Protocol):
    """Decodes samples: `decoding.Decoder` into pictures, `blocks.BlockDecoder` into tokens."""

    shape: tuple[int, ...]  # of what a sample becomes, in uint8

    @property
    def of_torch(self) -> bool:
        """Whether it draws from torch's global generator."""

    def decode(self, samples: Sequence[Loaded], random: Random, out: Pixels) -> dict[int, DataError]:
        """Decode samples into `out`, uint8 [B, *shape]. Returns by number what is wrong with a sample."""


def decode_batch(
    samples: Sequence[Loaded],
    decoder: Decodes,
    seed: int,
    out: Pixels,
    spares: Iterable[Loaded] = (),
    *,
    skip: bool,
    replace: bool,
) -> tuple[list[int], tuple[str, ...]]:
    """Decode samples into `out`, uint8 [B, *decoder.shape].

    The random numbers depend on the seed alone; the generators of this process are as before.

    Args:
        samples: B samples, or for a bad one what was wrong with it.
        spares: samples that are not of this batch; the first good one stands in where all samples are bad.
        skip: go on where a sample is bad.
        replace: a skipped sample is replaced by the next good one of its batch; otherwise by zeros, with label -1.
    Returns:
        Labels, and what was wrong with each skipped sample.
    Raises:
        DataError: a sample is bad and `skip` is false, or no sample is left to replace the bad ones.
    """
    with torch_seeded(seed, decoder.of_torch):
        random = Random(seed)
        bad = decoder.decode(samples, random, out)
        if bad and not skip:
            raise bad[min(bad)]
        labels = [-1 if isinstance(sample, DataError) else sample.label for sample in samples]
        for number in bad:
            labels[number], out[number] = -1, 0
        if replace and len(bad) == len(samples):
            labels[0] = decode_spare(decoder, spares, random, out[:1], [str(bad[number]) for number in sorted(bad)])
            out[1:], labels[1:] = out[0], [labels[0]] * (len(labels) - 1)
        elif replace:
            _replace_bad(out, labels, bad)
    return labels, tuple(str(bad[number]) for number in sorted(bad))


def decode_spare(decoder: Decodes, spares: Iterable[Loaded], random: Random, out: Pixels, bad: Sequence[str]) -> int:
    """Decode the first good spare into `out`, uint8 [1, *decoder.shape]. Returns its label.

    Raises:
        DataError: none is good; `bad` says what was wrong with the batch.
    """
    for spare in spares:
        if not isinstance(spare, DataError) and not decoder.decode([spare], random, out):
            return spare.label
    raise DataError(f"all {len(bad)} samples of a batch are bad, and those that come next; the last: {bad[-1]}")


def _replace_bad(out: Pixels, labels: list[int], bad: Mapping[int, DataError]) -> None:
    """Put the next good sample of the batch, or the first, in the place of each bad one; at least one is good."""
    good = [number for number in range(len(labels)) if number not in bad]
    for number in bad:
        other = next((n for n in good if n > number), good[0])
        out[number], labels[number] = out[other], labels[other]


@contextmanager
def torch_seeded(seed: int, wanted: bool) -> Iterator[None]:
    """torch's global generator seeded, and as before afterwards, where it is wanted at all: this takes 0.1 ms."""
    if not wanted:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it seeds the generators of all GPUs too, and with it the model's dropout.
        torch.default_generator.manual_seed(seed)
        yield
