"""Blocks of tokens, the samples of a text: how one is written, what it must be, how a batch is read. No torch.

A block is the member KEY.npy of a sample: a plain array of numpy, version 1.0, of one dimension, little-endian and
unsigned, of 8, 16 or 32 bits, the fewest that hold the vocabulary. It has `context` + 1 tokens: a model reads the first
`context` of them and predicts the last `context`. The last token of a block is the first of the one that follows it in
the text, so that every token is predicted once. All blocks of an index have the same bytes before their tokens, and
nothing else is taken: no part of numpy's reader, which can unpickle, sees what comes from elsewhere.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsr_engine.data.errors import DataError
from qsr_engine.data.index import TextData
from qsr_engine.data.samples import Loaded, Sample


def dtype_of(vocabulary: int) -> np.dtype[Any]:
    """The type of the tokens of so large a vocabulary, as a block has them."""
    return np.dtype("<u1" if vocabulary <= 1 << 8 else "<u2" if vocabulary <= 1 << 16 else "<u4")


def encode_block(tokens: NDArray[Any]) -> bytes:
    """The bytes of a block of tokens [context + 1], of the type that dtype_of() says."""
    return _head(tokens.dtype.str, len(tokens)) + tokens.tobytes()


@cache
def _head(dtype: str, length: int) -> bytes:
    """What stands before the tokens."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.empty(length, dtype), version=(1, 0), allow_pickle=False)
    return stream.getvalue()[: -length * np.dtype(dtype).itemsize]


class BlockDecoder:
    """Reads the tokens of samples.

    Args:
        text: what the index says of them.
    """

    of_torch = False  # it draws nothing

    def __init__(self, text: TextData) -> None:
        self._text, self._dtype = text, dtype_of(text.vocabulary)
        self._head = _head(self._dtype.str, text.context + 1)
        self.shape: tuple[int, ...] = ((text.context + 1) * self._dtype.itemsize,)

    def decode(self, samples: Sequence[Loaded], random: Random, out: NDArray[np.uint8]) -> dict[int, DataError]:
        """Put the bytes of the tokens into `out`, uint8 [B, bytes of a block's tokens].

        Returns:
            By number what is wrong with a sample, or was before. Its tokens are anything.
        """
        bad = {}
        for number, sample in enumerate(samples):
            try:
                if isinstance(sample, DataError):
                    raise sample
                out[number] = self._tokens(sample.whole())
            except DataError as error:
                bad[number] = error
        return bad

    def _tokens(self, sample: Sample) -> NDArray[np.uint8]:
        found, head = np.frombuffer(sample.image, np.uint8), self._head
        if len(found) != len(head) + self.shape[0] or not sample.image.startswith(head):
            raise DataError(
                f"{sample.where}: this is no block of {self._text.context + 1} tokens of type {self._dtype.name} as "
                "`qsr shards text` writes them; write this shard again"
            )
        most = int(found[len(head) :].view(self._dtype).max())
        if most >= self._text.vocabulary:
            raise DataError(
                f"{sample.where} has the token {most}, and index.json has a vocabulary of {self._text.vocabulary}"
            )
        return found[len(head) :]
