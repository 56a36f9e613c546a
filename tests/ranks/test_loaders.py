"""Loaders of a user's own feed both engines: those of docs/data.md, as they stand there, and such as cannot be used."""

from __future__ import annotations

import os
import re
import sys
import types
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr_engine.config.recipe import DataConfig
from qsr_engine.data import DataError, read_index
from qsr_engine.data.own_loader import OwnLoader
from tests.support.launch import qsr_job, records
from tests.support.pool import Processes
from tests.support.shard_files import noise

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def mine(shards: Path) -> types.ModuleType:
    """The module `mine` of the page, where a list stands in for a data set of the library `datasets`."""
    (code,) = re.findall(r"```python\n(# mine\.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module, datasets = types.ModuleType("mine"), types.ModuleType("datasets")
    exec(code, module.__dict__)
    rows = [{"image": noise_image(number), "label": number % 10} for number in range(250)]
    datasets.load_dataset = lambda *args, **kwargs: rows  # type: ignore[attr-defined]
    sys.modules.update(mine=module, datasets=datasets)
    os.environ.update(MY_SHARDS=f"{shards}/train-*.tar", MY_SAMPLES="1437", MY_PICTURES="pictures")
    return module


def noise_image(number: int) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(noise(number)))


def of_other_lengths(data: DataConfig, *, rank: int, **_: Any) -> Any:
    return sys.modules["mine"].Passes(7 + rank, None)


def own_loader_job(shards: Path, runs: list[list[str]]) -> list[tuple[int, str, str]]:
    mine(shards).of_other_lengths = of_other_lengths  # type: ignore[attr-defined]
    try:
        return [qsr_job(argv) for argv in runs]
    finally:
        del sys.modules["mine"], sys.modules["datasets"]


@pytest.mark.slow
def test_loaders_of_ones_own_feed_both_engines(processes: Processes, recipe: Path, digits: Path) -> None:
    """2 ranks of batches of 48: 14 on a pass over the shards' 1,437, 2 over the rows' 250; one is resumed."""

    def argv(name: str, *sets: str) -> list[str]:
        function = name.partition("-")[0]
        words = [f"data.loader=mine:{function}", f"logging.name={name}", "logging.eval_every=null", "logging.every=1"]
        return ["train", str(recipe), *(word for text in (*words, *sets) for word in ("--set", text))]

    runs = [
        argv("from_webdataset-fsdp", "engine=fsdp", "stop_at_step=5"),
        argv("from_webdataset-deepspeed", "stop_at_step=5"),
        argv("from_hugging_face-fsdp", "engine=fsdp", "stop_at_step=5"),
        argv("from_hugging_face-deepspeed", "stop_at_step=3"),
        [*argv("from_hugging_face-deepspeed", "stop_at_step=5"), "--resume"],
        argv("of_other_lengths"),
    ]
    for done in processes.run(own_loader_job, shards=digits, runs=runs):
        assert [code for code, _, _ in done] == [0, 0, 0, 0, 0, 1], done
        assert "batches of data.loader on every pass: 7 on rank 0; 8 on rank 1" in done[-1][2]
    folder = recipe.parent / "runs"
    assert not (folder / "of_other_lengths").exists(), "nothing was written before the ranks agreed"
    for function in ("from_webdataset", "from_hugging_face"):
        whole, other = (records(folder / f"{function}-{engine}") for engine in ("fsdp", "deepspeed"))
        assert [record["step"] for record in other] == [1, 2, 3, 4, 5]
        losses = [record["loss"] for record in whole]
        assert [record["loss"] for record in other] == pytest.approx(losses, rel=1e-4), "the same batches, resumed too"


@pytest.mark.parametrize("function", ["from_webdataset", "from_hugging_face"])
def test_every_rank_has_as_many_batches_of_its_own(digits: Path, function: str) -> None:
    module, config = mine(digits), DataConfig(shards=str(digits), image_size=8, loader=f"mine:{function}")
    ranks = [OwnLoader(config, classes=10, rank=rank, ranks=3, batch_size=16, seed=0) for rank in range(3)]
    assert {loader.batches_of_a_pass for loader in ranks} == {{"from_webdataset": 29, "from_hugging_face": 5}[function]}
    taken = [list(islice(loader.batches(torch.device("cpu")), 7)) for loader in ranks]
    assert len({bytes(batch.images.numpy().tobytes()) for batches in taken for batch in batches}) == 21
    again = OwnLoader(config, classes=10, rank=1, ranks=3, batch_size=16, seed=0)
    first = OwnLoader(config, classes=10, rank=1, ranks=3, batch_size=16, seed=0)
    list(islice(first.batches(torch.device("cpu")), 6))
    again.load_state_dict(first.state_dict())
    assert torch.equal(next(again.batches(torch.device("cpu"))).images, taken[1][6].images)
    with pytest.raises(DataError, match=r"that of rank 1 of 3, in batches of 16, and this is rank 0 of 3"):
        ranks[0].load_state_dict(first.state_dict())
    assert module.__name__ == "mine"


def images(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


class Given:
    """Gives one batch, and no length."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Any:
        yield self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    load_state_dict = state_dict


GOOD = (images(2, 3, 8, 8), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("loader", "made", "words"),
    [
        ("nowhere_at_all:f", None, "nowhere_at_all cannot be imported: No module named"),
        ("given:g", None, r"given has no function 'g'; write one"),
        ("given:f", [GOOD], r"gives a list without state_dict, load_state_dict; give an object"),
        ("given:f", ValueError("no pictures"), r"data\.loader given:f has failed: ValueError: no pictures"),
        ("given:f", Given(7), r"batch 0 of data\.loader given:f is a int; give a tuple of two tensors"),
        (
            "given:f",
            Given((images(2, 8, 8, 3), GOOD[1])),
            r"images .* are uint8 \[2, 8, 8, 3\]; give uint8 \[2, 3, 8, 8",
        ),
        ("given:f", Given((GOOD[0].float(), GOOD[1])), r"are float32 \[2, 3, 8, 8\]; give uint8"),
        ("given:f", Given((GOOD[0], GOOD[1].int())), r"labels .* are int32 \[2\]; give int64 \[2\]"),
        ("given:f", Given((GOOD[0], torch.tensor([1, 10]))), r"has the label 10; give labels from 0 to 9"),
        ("given:f", Given((GOOD[0], torch.tensor([-1, 1]))), r"has the label -1; give labels from 0 to 9"),
        ("given:f", Given(GOOD), r"came to its end after 1 batches; give batches without end, or a __len__"),
    ],
)
def test_what_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch, loader: str, made: Any, words: str) -> None:
    def function(data: DataConfig, **_: Any) -> Any:
        if isinstance(made, Exception):
            raise made
        return made

    module = types.ModuleType("given")
    module.f = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "given", module)
    config = DataConfig(shards="shards", image_size=8, loader=loader)
    with pytest.raises(DataError, match=words):
        list(OwnLoader(config, classes=10, rank=0, ranks=2, batch_size=2, seed=0).batches(torch.device("cpu")))


def test_the_loop_of_the_page(digits: Path) -> None:
    """A step of it."""
    (code,) = re.findall(
        r"```python\n(from qsr_engine import TrainLoader\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    code = code.replace("    ...\n", "    break\n").replace("batch_size=64", "batch_size=8").replace("=224", "=8")
    found: dict[str, Any] = {"folder": str(digits), "rank": 0, "ranks": 2}
    exec(code.replace("loader_processes=4", "loader_processes=0"), found)
    assert found["state"] == {"batches": 1, "skipped_samples": []}
    assert read_index(digits).split("train").samples == 1437
