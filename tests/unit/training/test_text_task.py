"""The task `text`: its keys, its figures, and the models that it takes. Training is in tests/ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qsr_engine.cli.main import main
from qsr_engine.config.recipe import ModelConfig, Recipe
from qsr_engine.config.recipe_file import dump_recipe, load_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import Index, read_index, write_text
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.index import TextData
from qsr_engine.training.language_models import create_language_model
from qsr_engine.training.make_task import make_task
from qsr_engine.training.text import TextTask
from tests.support.text import CONTEXT, text_recipe, write_documents

TEXT = TextData(context=4, vocabulary=300, end=0, bytes_per_token={"train": 3.0, "val": 2.5})
SMALL: dict[str, Any] = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 4}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_text(write_documents(tmp_path / "documents"), tmp_path / "shards", context=CONTEXT)
    return tmp_path / "shards"


def changed(tmp_path: Path, **keys: Any) -> Recipe:
    return load_recipe(text_recipe(tmp_path, tmp_path), [f"{key.replace('__', '.')}={keys[key]}" for key in keys])


def test_a_recipe_of_a_text_is_read_back_equal(tmp_path: Path) -> None:
    recipe = changed(tmp_path)
    assert (recipe.task, recipe.data.image_size) == ("text", 0)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe.model_copy()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"data__image_size": 8}, "data.image_size is for images, and task is 'text'; leave it out"),
        ({"data__mixup": 0.2}, "data.mixup is for images"),
        ({"data__augment": "crop"}, "data.augment is for images"),
        ({"batch_norm": "{}"}, "batch_norm is for images"),
        ({"model__channels_last": "true"}, "model.channels_last is for images"),
        ({"model__name": "timm/resnet18"}, "model.name is 'timm/resnet18' and task is 'text'; write transformers/gpt2"),
        ({"task": "images"}, "model.name is 'transformers/gpt2' and task is 'images'; write a model of images"),
        ({"task": "images", "model__name": "timm/resnet18"}, "data.image_size: this key is missing; write it"),
        ({"task": "texts"}, "task: found 'texts'"),
    ],
)
def test_keys_of_another_task_are_refused(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        changed(tmp_path, **keys)
    assert words in str(refused.value)


def test_shards_of_another_task_are_refused(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(ConfigError, match=r"task is 'text', and .* holds pictures; write shards of `qsr shards text`"):
        make_task(changed(tmp_path), read_index(digits))
    index = Index(classes=None, splits={}, text=TEXT)
    images = changed(tmp_path, task="images", model__name="timm/resnet18", data__image_size=8)
    with pytest.raises(ConfigError, match=r"task is 'images', and .* holds text; write task: text"):
        make_task(images, index)


def test_the_figures_of_an_evaluation(tmp_path: Path) -> None:
    """Loss of a token, perplexity, and bits of a byte; of two batches, one with a block that does not count."""
    task: Any = TextTask(changed(tmp_path), Index(classes=None, splits={}, text=TEXT))
    torch.manual_seed(0)
    blocks, total = torch.randint(300, (4, 5)), torch.zeros((), dtype=torch.float64)
    scores = torch.randn(4, 4, 300)
    content = (blocks[..., None] // torch.tensor([1, 256]) % 256).to(torch.uint8).flatten(1)
    for rows, labels in ((slice(0, 2), [0, 0]), (slice(2, 4), [0, -1])):
        inputs, targets = task.batch(ImageBatch(content[rows], torch.tensor(labels)))
        assert torch.equal(inputs, blocks[rows, :-1])
        total = total + task.totals(SimpleNamespace(logits=scores[rows]), targets).double()
    loss = F.cross_entropy(scores[:3].flatten(0, 1), blocks[:3, 1:].flatten()).item()
    found = task.evaluation(total.tolist())
    assert total[0] == 12
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-6)
    assert found["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert found["eval_bits_per_byte"] == pytest.approx(loss / math.log(2) / 2.5, rel=1e-6)
    assert task.evaluation([12.0, 12e4])["eval_perplexity"] < math.inf, "JSON has no such number"
    best = task.best({"eval_loss": 2.0}, {}, 5)
    assert best == {"best_loss": 2.0, "best_step": 5}
    assert task.best({"eval_loss": 2.5}, best, 10) == best
    assert task.best({"eval_loss": math.nan}, {}, 5) == {}
    inputs, targets = task.batch(task.blank(torch.device("cpu")))
    assert (inputs.shape, targets.tolist()) == ((1, 4), [[-1] * 4])


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("gpt2", {"n_layers": 2}, "has no 'n_layers' in its configuration; did you mean 'n_layer'?"),
        ("gpt-2", {}, "transformers has no causal language model 'gpt-2'; did you mean transformers/gpt2"),
        ("gpt2", {**SMALL, "n_positions": 3}, "blocks of the shards have 4 tokens, and transformers/gpt2 has 3"),
        ("gpt2", {**SMALL, "n_positions": 3}, "; write model.kwargs.n_positions 4, or shards of a shorter --context"),
        ("gpt2", {"max_position_embeddings": 3}, "; write model.kwargs.max_position_embeddings 4, or shards of a"),
        ("gpt2", {**SMALL, "n_head": 3}, "does not take"),
        ("gpt2", {**SMALL, "vocab_size": 299}, "model.kwargs.vocab_size is 299, and the data has 300 tokens"),
        ("bert", {"num_hidden_layers": 1, "hidden_size": 12}, "sees the tokens that it is to predict"),
    ],
)
def test_what_is_no_causal_model_for_these_blocks_is_refused(name: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        create_language_model(ModelConfig(name=f"transformers/{name}", kwargs=kwargs), TEXT)
    assert words in str(refused.value)


def test_plan_init_and_a_dry_run_of_a_text(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--model", "transformers/gpt2", "--shards", str(shards), "--epochs", "2"]) == 0
    written = load_recipe("my.yaml")
    assert (written.task, written.optimizer.type) == ("text", "AdamW")
    capsys.readouterr()
    assert main(["train", "my.yaml", "--dry-run", "--ranks", "2"]) == 0
    samples = read_index(shards).split("train").samples
    said = capsys.readouterr().out
    assert f"{samples} training samples of {CONTEXT} tokens in 1 shard" in said
    assert "transformers/gpt2: 86.04 million parameters" in said, "GPT-2's 124 million with an embedding of 256 tokens"
    recipe = text_recipe(tmp_path, shards)
    assert main(["plan", str(recipe), "--json", "--workers", "2", "--bandwidth", "1gbit", "--step-seconds", "1ms"]) == 0
    assert json.loads(capsys.readouterr().out)["total_steps"] == 14
    muon = ["--set", "optimizer={type: Muon, momentum: 0.95}", "--set", "engine=fsdp"]
    for command in (["plan"], ["train", "--dry-run", "--ranks", "2"]):
        assert main([*command, str(recipe), *muon]) == 0
    capsys.readouterr()
    elsewhere = ["--set", "data.shards=none", "--set", "model.kwargs.n_positions=8"]
    assert (
        main(["plan", str(recipe), *elsewhere, "--workers", "2", "--bandwidth", "1gbit", "--step-seconds", "1ms"]) == 0
    )
    assert "256 tokens and a context of 8, since there are no shards that say it" in capsys.readouterr().out
    for words, expected in (
        (["--model", "timm/resnet18", "--shards", str(shards)], "the shards hold text; write transformers/TYPE"),
        (["--model", "transformers/gpt2", "--shards", "none"], "index is missing"),
    ):
        assert main(["init", *words, "--out", "other.yaml"]) == 1
        assert expected in capsys.readouterr().err
