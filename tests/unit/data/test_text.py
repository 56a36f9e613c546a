"""Shards of blocks of tokens: what is written, and what of it a rank reads."""

from __future__ import annotations

import io
import itertools
import random
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qsr_engine.cli.main import main
from qsr_engine.config.recipe import DataConfig
from qsr_engine.data import DataError, Index, index_shards, read_index, shuffle_shards, verify_shards, write_text
from qsr_engine.data.index import INDEX_NAME
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.data.rows import pack
from qsr_engine.data.writing.folder import write_index
from qsr_engine.training.text import tokens_of
from tests.support.shard_files import read_samples, tar_bytes
from tests.support.text import CONTEXT, write_documents


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Index]:
    """Folder of the documents, folder of their shards, and its index."""
    folder = tmp_path_factory.mktemp("text")
    write_documents(folder / "documents")
    return (
        folder / "documents",
        folder / "shards",
        write_text([folder / "documents"], folder / "shards", context=CONTEXT),
    )


def blocks_of(folder: Path, index: Index, split: str, dtype: str = "<u1") -> list[list[int]]:
    """The tokens of every block of a split, by numpy's own reader."""
    found = []
    for sample in read_samples(folder, index, split):
        array = np.load(io.BytesIO(sample.image), allow_pickle=False)
        assert (array.dtype, array.shape) == (np.dtype(dtype), (index.text.context + 1,))  # type: ignore[union-attr]
        found.append(array.tolist())
    return found


def joined(blocks: list[list[int]]) -> list[int]:
    """The text of blocks in their order: each begins with the last token of the one before."""
    assert all(one[-1] == other[0] for one, other in itertools.pairwise(blocks))
    return [blocks[0][0], *(token for block in blocks for token in block[1:])]


def test_documents_are_packed_and_every_token_is_predicted_once(text: tuple[Path, Path, Index]) -> None:
    documents, folder, index = text
    contents = [path.read_bytes() for path in sorted(documents.iterdir())]
    random.Random(0).shuffle(contents)
    whole = b"".join(content + b"\0" for content in contents)
    val = bytes(joined(blocks_of(folder, index, "val")))
    cut = whole.index(val)
    assert whole[cut - 1 : cut] == b"\n", "a document is cut at the end of a line"
    assert abs((len(whole) - cut) / len(whole) - 0.05) < 100 / len(whole), "the share that is held out, but for a line"
    assert len(whole) - cut - len(val) < CONTEXT, "what fills no block is left out"

    shuffled = blocks_of(folder, index, "train")
    assert shuffled != sorted(shuffled, key=lambda block: whole.index(bytes(block)))
    in_order = [whole[first : first + CONTEXT + 1] for first in range(0, cut - CONTEXT, CONTEXT)]
    assert sorted(map(bytes, shuffled)) == sorted(in_order)

    assert index.text is not None
    assert (index.text.vocabulary, index.text.end, index.text.tokenizer) == (256, 0, "bytes")
    ends = whole[:cut].count(b"\0")
    assert index.text.bytes_per_token["train"] == (cut - ends) / (cut + 1)  # the cut document ends twice
    assert verify_shards(folder) == index == read_index(folder)


def test_the_same_text_gives_the_same_bytes(text: tuple[Path, Path, Index], tmp_path: Path) -> None:
    documents, _, index = text
    assert write_text(sorted(documents.iterdir()), tmp_path / "again", context=CONTEXT, processes=2) == index
    other = write_text([documents], tmp_path / "other", context=CONTEXT, seed=1)
    assert other.digest() != index.digest()
    assert index_shards(tmp_path / "other", again=True) == other


def test_shuffled_blocks_are_the_same_ones(text: tuple[Path, Path, Index], tmp_path: Path) -> None:
    _, folder, index = text
    made = shuffle_shards(folder, tmp_path, shard_bytes=20_000, seed=3)
    assert made.text == index.text
    assert len(made.splits["train"].shards) > 1
    one, other = (blocks_of(*place, "train") for place in ((folder, index), (tmp_path, made)))
    assert one != other
    assert sorted(one) == sorted(other)


def test_a_tokenizer_of_a_file_and_its_own_end(text: tuple[Path, Path, Index], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    documents = write_documents(tmp_path / "documents", count=2)
    words = sorted({word for path in documents for word in path.read_text().split()})
    vocabulary = {word: 300 + number for number, word in enumerate(words)} | {f"unused-{n}": n for n in range(300)}
    vocabulary |= {"<eos>": 70_000 - 1, **{f"more-{n}": n for n in range(300 + len(words), 70_000 - 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="unused-0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "own.json"))
    options: dict[str, Any] = {"context": CONTEXT, "held_out": 0.2, "tokenizer": tmp_path / "own.json"}
    index = write_text([tmp_path / "documents"], tmp_path / "shards", **options)
    assert index.text is not None
    assert (index.text.vocabulary, index.text.end) == (70_000, 69_999)
    assert (tmp_path / "shards" / "tokenizer.json").read_bytes() == (tmp_path / "own.json").read_bytes()

    contents = [path.read_text() for path in documents]
    random.Random(0).shuffle(contents)
    expected = [token for content in contents for token in [*(vocabulary[word] for word in content.split()), 69_999]]
    found = joined(sorted_by(expected, blocks_of(tmp_path / "shards", index, "train", "<u4")))
    assert found == expected[: len(found)]
    val = joined(blocks_of(tmp_path / "shards", index, "val", "<u4"))
    assert len(found) + len(val) > len(expected) - 2 * CONTEXT
    config = DataConfig(shards=str(tmp_path / "shards"))
    (batch,) = EvalLoader(tmp_path / "shards", index, config, rank=0, ranks=1, batch_size=100)
    assert joined(tokens_of(batch.images, 4).tolist()) == val
    with pytest.raises(DataError, match=r"no token <none>, with which a document would end; name one .* with --end"):
        write_text([tmp_path / "documents"], tmp_path / "never", end="<none>", **options)


def sorted_by(text: list[int], blocks: list[list[int]]) -> list[list[int]]:
    starts = {tuple(text[first : first + CONTEXT + 1]): first for first in range(0, len(text), CONTEXT)}
    return sorted(blocks, key=lambda block: starts[tuple(block)])


def test_tokens_of_16_bits_are_unsigned() -> None:
    content = np.array([[1, 40_000, 65_535]], "<u2").view(np.uint8)
    assert tokens_of(torch.from_numpy(content), 2).tolist() == [[1, 40_000, 65_535]]


@pytest.mark.parametrize("shuffle", ["buffer", "samples"])
def test_ranks_read_every_block_once_an_epoch_and_go_on_anywhere(text: tuple[Path, Path, Index], shuffle: str) -> None:
    _, folder, index = text
    config = DataConfig(shards=str(folder), shuffle_buffer=50, shuffle=shuffle)  # type: ignore[arg-type]
    samples, ranks, size = index.split("train").samples, 2, 4
    loaders = [TrainLoader(folder, index, config, rank=r, ranks=ranks, batch_size=size, seed=0) for r in range(ranks)]
    steps = samples // (ranks * size)
    read: list[list[torch.Tensor]] = []
    for loader in loaders:
        batches = loader.batches()
        read.append([tokens_of(next(batches).images, 1) for _ in range(steps)])
    seen = [tuple(block) for batches in read for batch in batches for block in batch.tolist()]
    all_of_them = [tuple(block) for block in blocks_of(folder, index, "train")]
    assert len(seen) > samples - ranks * size
    assert not Counter(seen) - Counter(all_of_them), "none of them twice"
    again = loaders[1].batches(5)
    assert torch.equal(tokens_of(next(again).images, 1), read[1][5])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: (folder / "a.txt").write_bytes(b"a\0b" * 999), "a.txt: this is no text, it has a byte of 0"),
        (
            lambda folder: (folder / "a.txt").write_bytes("grün\n".encode() * 999 + "grün".encode("latin-1")),
            r"a.txt: this is no text in UTF-8: invalid start byte at byte 5996 \(0xfc\); convert it, or leave it",
        ),
        (lambda folder: (folder / "a.txt").write_text("short"), "tokens for the split 'train', and a block has 257"),
        (lambda folder: (folder / "a.pdf").write_text("x"), r"no file in it ends in \.txt, \.md, \.rst; name others"),
        (lambda folder: folder.rmdir(), "there is no such file; name files of text, or folders of them"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, make: Any, words: str) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    with pytest.raises(DataError, match=words):
        write_text([tmp_path / "in"], tmp_path / "out")
    assert not (tmp_path / "out" / INDEX_NAME).exists()


def test_the_command_writes_what_the_function_does(
    text: tuple[Path, Path, Index], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents, _, index = text
    words = ["shards", "text", str(documents), str(tmp_path / "out"), "--context", str(CONTEXT)]
    assert main([*words, "--processes", "1"]) == 0
    assert "split 'val'" in capsys.readouterr().out
    assert read_index(tmp_path / "out") == index
    assert main([*words, "--end", "</s>"]) == 1
    assert "holds a data set already" in capsys.readouterr().err


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was-here"),)


@pytest.mark.parametrize("kind", ["pickled", "longer", "other type", "signed", "other token"])
def test_a_block_that_is_none_is_named_and_nothing_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Blocks that come from elsewhere, with an index of their own."""
    monkeypatch.chdir(tmp_path)
    good = np.arange(5, dtype="<u1")
    stream = io.BytesIO()
    if kind == "pickled":
        np.save(stream, np.array([Evil()], dtype=object), allow_pickle=True)
    else:
        bad = {
            "longer": np.arange(6, dtype="<u1"),
            "other type": good.astype("<u2"),
            "signed": good.astype("i1"),
            "other token": good + 200,
        }[kind]
        np.save(stream, bad)
    path = tmp_path / "train-000000.tar"
    path.write_bytes(tar_bytes({"a.npy": encode(good), "b.npy": stream.getvalue()}))
    shard = {"name": "train-000000.tar", "samples": 2, "bytes": 10240, "sha256": "0" * 64}
    about = {"context": 4, "vocabulary": 200, "end": 0, "bytes_per_token": {"train": 1.0}}
    raw = {"format": 1, "classes": None, "splits": {"train": {"samples": 2, "shards": [shard]}}, "text": about}
    with tarfile.open(path) as tar:
        rows = [pack(info.offset_data, tar.extractfile(info).read(), 0, 1) for info in tar]  # type: ignore[union-attr]
    write_index(tmp_path, Index.model_validate(raw), [b"".join(rows)])
    index = read_index(tmp_path)
    loader = EvalLoader(tmp_path, index, DataConfig(shards=".", eval="train"), rank=0, ranks=1, batch_size=2)
    with pytest.raises(DataError, match=r"sample 'b'.*(no block of 5 tokens of type uint8|has the token 204)"):
        list(loader)
    assert not (tmp_path / "was-here").exists()


def encode(tokens: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, tokens)
    return stream.getvalue()


def test_parts_of_one_kind_are_joined(text: tuple[Path, Path, Index], tmp_path: Path, digits: Path) -> None:
    _, folder, index = text
    write_documents(tmp_path / "documents", count=3, seed=5)
    more = write_text([tmp_path / "documents"], tmp_path / "more", context=CONTEXT)
    whole = read_index([str(folder), str(tmp_path / "more")])
    assert index.text is not None
    assert more.text is not None
    assert whole.text is not None
    rates = sorted([index.text.bytes_per_token["val"], more.text.bytes_per_token["val"]])
    assert rates[0] <= whole.text.bytes_per_token["val"] <= rates[1]
    config = DataConfig(shards=[str(folder), str(tmp_path / "more")])
    batches = list(EvalLoader(config.shards, whole, config, rank=0, ranks=1, batch_size=7))
    assert sum(len(batch.labels) for batch in batches) == sum(i.split("val").samples for i in (index, more))
    with pytest.raises(DataError, match="its samples are no text, or alone are one"):
        read_index([str(folder), str(digits)])
    write_text([tmp_path / "documents"], tmp_path / "longer", context=CONTEXT + 1)
    with pytest.raises(DataError, match="its blocks have another context or tokenizer"):
        read_index([str(folder), str(tmp_path / "longer")])
