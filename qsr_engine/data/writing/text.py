"""Make a folder of shards from files of text: documents packed behind one another, and cut into blocks of tokens.

    documents     in an order drawn by the seed; the last part of their bytes is held out, as the split "val"
    tokens        a document's own, then one that ends it; without a tokenizer they are the bytes, and 0 ends a document
    blocks        of `context` + 1 tokens, each beginning with the last token of the one before; what is left at the end
                  of a split and fills no block is left out
    shards        of blocks in an order drawn by the seed

The tokens of all documents lie in a temporary folder meanwhile, so that no text is too large for the memory.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from qsr_engine.data.blocks import dtype_of, encode_block
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import TOKENS, Index, TextData
from qsr_engine.data.writing.data_sets import SHARD_BYTES
from qsr_engine.data.writing.folder import refuse_data_set, replacing
from qsr_engine.data.writing.resuming import ShardPlan, ShardSize, write_planned

SUFFIXES = (".txt", ".md", ".rst")  # of the files that are read of a folder
HELD_OUT = 0.05
TOKENIZER = "tokenizer.json"
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # of well-known tokenizers, the first that is there


class _Tokenizer(Protocol):
    name: str  # as the index has it
    vocabulary: int
    end: int

    def tokens(self, document: bytes) -> NDArray[Any]:
        """Of a text in UTF-8."""


class _Bytes:
    name, vocabulary, end = "bytes", 256, 0

    def tokens(self, document: bytes) -> NDArray[Any]:
        return np.frombuffer(document, np.uint8)


class _OfFile:
    """A tokenizer.json of the library tokenizers. Raises DataError where it cannot be used."""

    def __init__(self, path: Path, end: str | None) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise DataError(f"--tokenizer {path}: the package tokenizers is missing: pip install tokenizers") from error
        try:
            content = path.read_text(encoding="utf-8")
            self._made = Tokenizer.from_str(content)
        except OSError as error:
            raise DataError(f"--tokenizer {path}: cannot be read: {error.strerror or error}") from error
        except Exception as error:  # the library's own, which has no class
            raise DataError(f"--tokenizer {path}: not a tokenizer.json that can be used: {error}") from error
        self.name = hashlib.sha256(content.encode()).hexdigest()
        self.vocabulary = self._made.get_vocab_size(with_added_tokens=True)
        wanted = _ENDS if end is None else (end,)
        ids = [found for token in wanted if (found := self._made.token_to_id(token)) is not None]
        if not ids:
            raise DataError(
                f"--tokenizer {path}: it has no token {' or '.join(wanted)}, with which a document would end; name one "
                "that it has with --end"
            )
        self.end = ids[0]

    def tokens(self, document: bytes) -> NDArray[Any]:
        return np.array(self._made.encode(document.decode(), add_special_tokens=False).ids, dtype_of(self.vocabulary))


class _Block(NamedTuple):
    """A block in a file of tokens, by the number of its first token there."""

    file: str
    first: int


def write_text(
    sources: Iterable[str | Path],
    out: str | Path,
    *,
    context: int = 256,
    tokenizer: str | Path | None = None,
    end: str | None = None,
    held_out: float = HELD_OUT,
    suffixes: Sequence[str] = SUFFIXES,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    processes: int = 1,
) -> Index:
    """Write shards of blocks of tokens, splits "train" and "val", from files of text; each file is a document.

    When this was killed, call it again: finished shards are kept where they still have their checksums.

    Args:
        sources: files, and folders of which every file with one of the suffixes is taken.
        context: tokens that a block predicts.
        tokenizer: a tokenizer.json, of which the folder gets a copy; None: every byte is a token.
        end: its token that ends a document; None: a well-known one that it has.
        held_out: the share of the bytes that becomes the split "val". One document at most is in both, cut at the end
            of a line.
        shard_bytes: a shard has at most so many.
        seed: of the orders of documents and blocks.
        processes: number of processes that write.
    Raises:
        DataError: a file cannot be read or is no text, there is not enough of it for a block of each split, the
            tokenizer cannot be used, or out holds another data set or cannot be written.
    """
    out = Path(out)
    refuse_data_set(out)
    if context < 1 or not 0 < held_out < 1:
        raise DataError(f"context is {context} and held_out {held_out:g}; write at least 1, and between 0 and 1")
    if end is not None and tokenizer is None:
        raise DataError(
            f"--end {end}: it is a token of --tokenizer, which is not given; leave it out: 0 is the end then"
        )
    used: _Tokenizer = _Bytes() if tokenizer is None else _OfFile(Path(tokenizer), end)
    files = _files(sources, suffixes)
    random.Random(seed).shuffle(files)
    with tempfile.TemporaryDirectory(prefix="qsr-text-") as folder:
        splits = {name: _Tokens(Path(folder) / name, used) for name in ("train", "val")}
        digest = _tokenize(files, splits["train"], splits["val"], held_out)
        text = TextData(
            context=context,
            vocabulary=used.vocabulary,
            end=used.end,
            tokenizer=used.name,
            bytes_per_token={name: split.bytes / max(1, split.count) or 1.0 for name, split in splits.items()},
        )
        blocks = {name: split.blocks(context) for name, split in splits.items()}
        random.Random(seed).shuffle(blocks["train"])
        plan = ShardPlan(
            None,
            blocks,
            {name: [(context + 1) * dtype_of(used.vocabulary).itemsize] * len(of) for name, of in blocks.items()},
            partial(_load, dtype=dtype_of(used.vocabulary).str, length=context + 1),
            ShardSize(shard_bytes, None),
            {
                "documents": digest,
                "seed": seed,
                "context": context,
                "tokenizer": used.name,
                "held_out": str(held_out),
                "shard_bytes": shard_bytes,
            },
            text,
        )
        index = write_planned(out, plan, processes)
    if tokenizer is not None:
        with Path(tokenizer).open("rb") as source, replacing(out / TOKENIZER) as copy:
            shutil.copyfileobj(source, copy)
    return index


class _Tokens:
    """The tokens of a split, in a file."""

    def __init__(self, path: Path, tokenizer: _Tokenizer) -> None:
        self.path, self._tokenizer = path, tokenizer
        self.count = self.bytes = 0  # tokens, and bytes of their text
        path.touch()

    def add(self, document: bytes) -> None:
        if not document:
            return
        tokens = self._tokenizer.tokens(document)
        ended = np.append(tokens, self._tokenizer.end).astype(dtype_of(self._tokenizer.vocabulary))
        with self.path.open("ab") as stream:
            stream.write(ended.tobytes())
        self.count += len(ended)
        self.bytes += len(document)

    def blocks(self, context: int) -> list[_Block]:
        """Raises DataError where there are too few tokens for one."""
        found = [_Block(str(self.path), first) for first in range(0, self.count - context, context)]
        if not found:
            raise DataError(
                f"there are {self.count} tokens for the split {self.path.name!r}, and a block has {context + 1}; give "
                "more text, a shorter --context, or another --held-out"
            )
        return found


def _tokenize(files: Sequence[Path], train: _Tokens, val: _Tokens, held_out: float) -> str:
    """Put the tokens of all files into the two splits. Returns a digest of names and contents."""
    try:
        left = round((1 - held_out) * sum(file.stat().st_size for file in files))  # bytes for training
        sha256 = hashlib.sha256()
        for file in files:
            document = file.read_bytes()
            _check_text(document, file)
            sha256.update(f"{file}\0{len(document)}\0".encode(errors="surrogateescape") + document)
            cut = len(document) if len(document) <= left else _end_of_line(document, max(0, left)) if left > 0 else 0
            train.add(document[:cut])
            val.add(document[cut:])
            left -= len(document)
    except OSError as error:
        raise DataError(f"{error.filename}: this file cannot be read: {error.strerror or error}") from error
    return sha256.hexdigest()


def _check_text(document: bytes, file: Path) -> None:
    """Raises DataError where it is not in UTF-8, or has a byte of 0, which ends a document."""
    if b"\0" in document:
        raise DataError(f"{file}: this is no text, it has a byte of 0; convert it, or leave it out")
    try:
        document.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: this is no text in UTF-8: {error.reason} at byte {error.start} (0x{document[error.start]:02x}); "
            "convert it, or leave it out"
        ) from error


def _end_of_line(document: bytes, place: int) -> int:
    """The end of the line, or else of the character, at a place in a document."""
    found = document.find(b"\n", place)
    if 0 <= found < len(document) - 1:
        return found + 1
    while place < len(document) and document[place] & 0xC0 == 0x80:
        place += 1
    return place


def _files(sources: Iterable[str | Path], suffixes: Sequence[str]) -> list[Path]:
    """The files that sources name, sorted, each once. Raises DataError where one is not there, or gives none."""

    def of(source: Path) -> Iterator[Path]:
        if source.is_dir():
            found = [path for path in source.rglob("*") if path.suffix in suffixes and path.is_file()]
            if not found:
                raise DataError(f"{source}: no file in it ends in {', '.join(suffixes)}; name others with --suffix")
            yield from found
        elif source.is_file():
            yield source
        else:
            raise DataError(f"{source}: there is no such file; name files of text, or folders of them")

    return sorted({path for source in sources for path in of(Path(source))})


def _load(block: _Block, *, dtype: str, length: int) -> tuple[str, bytes, None]:
    offset = block.first * np.dtype(dtype).itemsize
    return TOKENS, encode_block(np.fromfile(block.file, dtype, length, offset=offset)), None
