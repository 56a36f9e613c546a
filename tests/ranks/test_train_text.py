"""Language models: `qsr train` of a text on several ranks, and Trainer with a GPT."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.data import Index, read_index, write_text
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.engines.muon import MuonWithAdamW
from qsr_engine.training.make_task import make_task
from qsr_engine.training.text import tokens_of
from tests.support import reference
from tests.support.attached import accelerate_without_gpu
from tests.support.counting import collectives_across_workers
from tests.support.launch import interrupted_job, qsr_job, records, train, workers
from tests.support.own_parameters import own_parameters
from tests.support.pool import Processes
from tests.support.text import CONTEXT, STEPS, text_recipe, write_documents

WIDTH, HEADS = 16, 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_text(write_documents(folder / "documents"), folder / "shards", context=CONTEXT)
    return folder / "shards"


def cross_entropy(outputs: Any, targets: Tensor, **options: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits.reshape(-1, 256), targets.reshape(-1), **options)


def plain_loss(model: nn.Module, shards: Path, index: Index, config: Any) -> tuple[float, int]:
    """Mean loss of the split val, and its tokens: one block after another."""
    total, tokens = 0.0, 0
    for batch in EvalLoader(shards, index, config, rank=0, ranks=1, batch_size=1):
        block = tokens_of(batch.images, 1)
        with torch.no_grad():
            total += cross_entropy(model(block[:, :-1]), block[:, 1:], reduction="sum").item()
        tokens += block.shape[1] - 1
    return total / tokens, tokens


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(("engine", "optimizer"), [("deepspeed", "AdamW"), ("fsdp", "AdamW"), ("fsdp", "Muon")])
def test_a_language_model_trains_as_the_reference_says(
    processes: Processes, tmp_path: Path, shards: Path, engine: str, optimizer: str
) -> None:
    """Shared embeddings and all, with labels smoothed; and its records are those of a text."""
    more = ["optimizer.type=Muon", "optimizer.momentum=0.9"] if optimizer == "Muon" else []
    run = train(processes, text_recipe(tmp_path, shards), f"engine={engine}", "label_smoothing=0.1", *more)
    resolved = load_recipe(run / "recipe.yaml")
    index = read_index(shards)
    shapes: dict[str, Any] = {"ranks": 2, "batch_size": 8, "seed": 0}
    streams = [TrainLoader(shards, index, resolved.data, rank=rank, **shapes).batches() for rank in range(2)]

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        return make_task(resolved, index).create_model()

    def batch(worker: int, step: int) -> list[tuple[Tensor, Tensor]]:
        blocks = tokens_of(next(streams[worker]).images, 1)
        return [(blocks[:, :-1], blocks[:, 1:])]

    def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if optimizer == "AdamW":
            return torch.optim.AdamW(parameters, lr=0, weight_decay=0.05)
        names = [name for name, _ in make_model().named_parameters()]
        in_blocks = [".h." in name and parameter.ndim == 2 for name, parameter in zip(names, parameters, strict=True)]
        groups = [
            {"params": [p for p, of_block in zip(parameters, in_blocks, strict=True) if of_block is muon], "muon": muon}
            for muon in (True, False)
        ]
        return MuonWithAdamW(groups, lr=0, weight_decay=0.05, momentum=0.9, betas=(0.9, 0.999))

    models, _ = reference.simulate(
        make_model,
        make_optimizer,
        batch,
        resolved.qsr.model_dump(exclude_none=True),
        workers=2,
        clip=1.0,
        loss=lambda outputs, targets: cross_entropy(outputs, targets, label_smoothing=0.1),
    )
    found = load_file(run / "model.safetensors")
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)  # of clipping, by another order of sums
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])

    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(run)  # in the mode of an evaluation
    loss, tokens = plain_loss(model, shards, index, resolved.data)
    rows = records(run)
    evaluated = [row for row in rows if row["eval_loss"] is not None]
    assert [row["step"] for row in evaluated] == [5, 10, STEPS]
    assert evaluated[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert evaluated[-1]["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert index.text is not None
    bits = loss / math.log(2) / index.text.bytes_per_token["val"]
    assert evaluated[-1]["eval_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    best = min(evaluated, key=lambda row: row["eval_loss"])
    assert (evaluated[-1]["best_loss"], evaluated[-1]["best_step"]) == (best["eval_loss"], best["step"])
    for row in rows:
        assert (row["tokens_seen"], row["images_seen"]) == (16 * CONTEXT * row["step"], None)
        assert row["tokens_per_second"] > 0
        assert [row[name] for name in ("images_per_second", "eval_accuracy", "train_accuracy")] == [None] * 3
    assert {row["accuracy"] for row in workers(run)} == {None}
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["tokens_seen"], summary["eval_loss"]) == (16 * CONTEXT * STEPS, evaluated[-1]["eval_loss"])
    assert tokens % CONTEXT == 0


@pytest.mark.parametrize("name", ["text-qsr.yaml", "text-muon.yaml"])
def test_the_examples_of_a_text_run(processes: Processes, tmp_path: Path, shards: Path, name: str) -> None:
    """Their first steps, on other text."""
    for config in (Path(__file__).parents[2] / "configs").glob("text-*.yaml"):
        (tmp_path / config.name).write_text(config.read_text())
    path = tmp_path / name
    sets = ["qsr.total_steps=3", "qsr.lr.warmup_steps=1", f"data.shards={shards}", f"logging.dir={tmp_path / 'runs'}"]
    assert records(train(processes, path, *sets))[-1]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("more", [["precision.zero_stage=3"], ["engine=fsdp", "precision.dtype=bf16"]])
def test_a_text_run_that_died_goes_on_to_the_same_bits(
    processes: Processes, tmp_path: Path, shards: Path, more: list[str]
) -> None:
    """With dropout and a loader process, in the middle of a round; sharpness is measured on the way."""
    recipe = text_recipe(tmp_path, shards)
    options = ["model.kwargs.resid_pdrop=0.1", "data.loader_processes=1", "logging.checkpoint_every=4"]
    overrides = [*options, *more, "qsr.alpha=0.009", "logging.sharpness_samples=16"]
    whole = train(processes, recipe, *overrides)
    saved = [json.loads(path.read_text()) for path in sorted(whole.glob("checkpoints/*/manifest.json"))]
    assert [manifest["inside_round"] for manifest in saved][1], "from where the run that dies goes on"
    sets = [word for override in (*overrides, "logging.name=died") for word in ("--set", override)]
    argv = ["train", str(recipe), *sets]
    assert processes.run(interrupted_job, argv=argv, at_step=11) == [130, 130]
    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume"]):
        assert code == 0, err
    died = recipe.parent / "runs" / "died"
    one, other = (load_file(run / "model.safetensors") for run in (whole, died))
    assert all(torch.equal(one[name], other[name]) for name in one)
    timed = {"seconds_compute", "seconds_averaging", "seconds_data", "tokens_per_second", "data_percent"}
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in records(run)] for run in (whole, died)]
    assert rows[0] == rows[1]
    assert rows[0][-1]["sharpness"] is not None


# ------------------------------------------------------------------------------------------------------- Trainer


def trainer_job(folder: str, shards: str) -> dict[str, Any]:
    """Trainer on the blocks of the shards, evaluated inside a round."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    import qsr_engine
    from qsr_engine.config.recipe import DataConfig

    index = read_index(shards)
    splits = []
    for split in ("train", "val"):
        loader = EvalLoader(shards, index, DataConfig(shards=shards, eval=split), rank=0, ranks=1, batch_size=1)
        blocks = [tokens_of(batch.images, 1)[0, 1:] for batch in islice(loader, 64 if split == "train" else 8)]
        # Trainer divides by the number of labels, of which the model leaves the first out.
        labels = [block.index_fill(0, torch.tensor(0), -100) for block in blocks]
        splits.append([{"input_ids": one, "labels": other} for one, other in zip(blocks, labels, strict=True)])
    kwargs: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=WIDTH, n_layer=1, n_head=HEADS, **kwargs)
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    deepspeed = {
        **dict.fromkeys(auto, "auto"),
        "zero_optimization": {"stage": 1},
        "qsr": {"strategy": "constant", "h_base": 4, "total_steps": 8},
    }
    with accelerate_without_gpu():
        arguments = TrainingArguments(
            output_dir=folder,
            deepspeed=deepspeed,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            max_steps=8,
            eval_strategy="steps",
            eval_steps=6,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        )
        seen: dict[int, tuple[int, dict[str, Tensor]]] = {}

        class Watched(Trainer):
            """What it holds after every step, and what it met others for."""

            deepspeed: Any

            def get_batch_samples(self, *args: Any) -> Any:
                self.before = collectives_across_workers(worker_size=1)
                return super().get_batch_samples(*args)

            def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
                met = collectives_across_workers(worker_size=1) - self.before
                seen.setdefault(self.state.global_step, (met, own_parameters(self.deepspeed)))
                super()._maybe_log_save_evaluate(*args, **kwargs)

        torch.manual_seed(0)
        trainer = Watched(GPT2LMHeadModel(config), arguments, train_dataset=splits[0], eval_dataset=splits[1])
        with qsr_engine.attach():
            trainer.train()
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    model: nn.Module = GPT2LMHeadModel(config)
    nn.Module.eval(model)
    batch = {key: torch.stack([sample[key] for sample in splits[1]]) for key in ("input_ids", "labels")}
    average = {}
    for name, value in seen[6][1].items():
        torch.distributed.all_reduce(mean := value.clone())
        average[name] = mean.div(2).float()
    model.load_state_dict(average, strict=False)  # the head is the embedding
    with torch.no_grad():
        expected = model(**batch).loss.item()
    return {"seen": seen, "evaluated": logged[6], "expected": expected}


def test_trainer_takes_local_steps_with_a_gpt(processes: Processes, tmp_path: Path, shards: Path) -> None:
    first, second = processes.run(trainer_job, folder=str(tmp_path), shards=str(shards))
    assert list(first["seen"]) == list(range(1, 9))
    for step, (met, held) in first["seen"].items():
        boundary = step in (4, 8)
        assert bool(met) == bool(second["seen"][step][0]) == boundary, f"step {step}"
        same = [torch.equal(value, second["seen"][step][1][name]) for name, value in held.items()]
        assert all(same) == boundary, f"step {step}"
    assert first["evaluated"] == second["evaluated"] == pytest.approx(first["expected"], rel=1e-5)
    assert first["evaluated"] < math.log(256)
