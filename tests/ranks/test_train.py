"""Training a recipe end to end: the `qsr train` of every rank."""

from __future__ import annotations

import importlib
import json
import math
import os
import statistics
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.data import read_index
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.records.records import TAGS
from qsr_engine.records.runs import read_run
from qsr_engine.records.tensorboard import COUNTERS
from qsr_engine.training.models import create_model
from qsr_engine.training.sharpness import largest_eigenvalue
from tests.support import reference
from tests.support.launch import qsr_job, records, train, workers
from tests.support.pool import Processes
from tests.support.recipes import STEPS, normalised

OF_TEXT = {"eval_perplexity", "eval_bits_per_byte", "best_loss"}
NOT_TOLD = {"eval/sharpness", "norms/momentum_buffer", "train/loss_scale", "local_steps/largest_z"}  # by this run


class InTwo(nn.Module):
    """A model that gives a tuple in training, as GoogLeNet and Inception do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Any:
        scores = self.model(images)
        return (scores, None, scores) if self.training else scores


def tuple_job(argv: list[str]) -> int:
    """`qsr train` of the recipe's model in two."""
    module: Any = importlib.import_module("qsr_engine.training.images")
    original = module.create_model
    module.create_model = lambda *args: InTwo(original(*args))
    try:
        return qsr_job(argv)[0]
    finally:
        module.create_model = original


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(
    "engine", [[], ["engine=fsdp"], ["precision.zero_stage=3"]], ids=["deepspeed", "fsdp", "zero3"]
)
def test_a_tuple_of_scores_for_more_classes_than_the_data_has(
    processes: Processes, recipe: Path, engine: list[str]
) -> None:
    """MixUp's shares are of the model's classes; the loss is that of all scores."""
    kwargs = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2, num_classes: 12}"
    sets = [
        "logging.name=two",
        f"model.kwargs={kwargs}",
        "data.mixup=0.2",
        "qsr.total_steps=2",
        "logging.every=1",
        *engine,
    ]
    argv = ["train", str(recipe), *[word for text in sets for word in ("--set", text)]]
    assert processes.run(tuple_job, ranks=2, argv=argv) == [0, 0]
    first, *_ = records(recipe.parent / "runs" / "two")
    assert first["loss"] == pytest.approx(1.3 * math.log(12), rel=0.2)


class Noting(nn.Module):
    """A model that notes in which types it computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.types = model, set[tuple[bool, torch.dtype, torch.dtype]]()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.model(images)
        self.types.add((self.training, next(self.model.parameters()).dtype, scores.dtype))
        return scores


def autocast_job(argv: list[str]) -> tuple[int, set[tuple[bool, torch.dtype, torch.dtype]]]:
    """`qsr train`; and what its model noted since it was made."""
    module: Any = importlib.import_module("qsr_engine.training.images")
    original, noted = module.create_model, []

    def create(*args: Any) -> nn.Module:
        noted.append(Noting(original(*args)))
        return noted[-1]

    module.create_model = create
    try:
        return qsr_job(argv)[0], noted[0].types
    finally:
        module.create_model = original


@pytest.mark.fast_cells(2)
@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        ("bf16", ["engine=fsdp"]),
        ("fp16", []),
        ("bf16", ["engine=fsdp", "qsr.worker_size=2"]),
        ("bf16", ["precision.zero_stage=3"]),
        ("fp16", ["precision.zero_stage=2"]),
    ],
)
def test_autocast_computes_in_low_precision_on_parameters_in_fp32(
    processes: Processes, recipe: Path, dtype: str, more: list[str]
) -> None:
    """In training and in evaluation."""
    sets = ["logging.name=cast", f"precision.autocast={dtype}", "qsr.total_steps=4", "logging.every=1", *more]
    argv = ["train", str(recipe), *[word for text in sets for word in ("--set", text)]]
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for code, types in processes.run(autocast_job, ranks=2, argv=argv):
        assert code == 0
        assert types == {(training, torch.float32, low) for training in (True, False)}
    run = recipe.parent / "runs" / "cast"
    assert all(2.2 < row["loss"] < 2.5 for row in records(run)), "the loss is not shown scaled"
    scale = 2.0**16 if dtype == "fp16" else None
    assert [row["loss_scale"] for row in records(run)] == [scale] * 4
    assert all(row["gradient_norm"] < 100 for row in records(run)), "nor the gradient"
    assert all(tensor.dtype == torch.float32 for tensor in load_file(run / "model.safetensors").values())


def slow_worker_job(argv: list[str], slow: int, delay: float) -> tuple[int, list[bool]]:
    """`qsr train` where one rank is slow at every step. Also: for each gathering, whether it was on a boundary."""
    module: Any = importlib.import_module("qsr_engine.training.loop")
    figures: Any = importlib.import_module("qsr_engine.training.figures")
    original, gathered = module._Run._step, []

    def step(run: Any) -> bool:
        if os.environ["RANK"] == str(slow):
            time.sleep(delay)  # this is the slowness, not a wait for something
        boundary = bool(original(run))
        gather.run = run  # type: ignore[attr-defined]
        return boundary

    def gather(*args: Any) -> None:
        gathered.append(gather.run.engine.local_steps.on_boundary)  # type: ignore[attr-defined]
        flat(*args)

    flat = figures.all_gather_flat
    module._Run._step, figures.all_gather_flat = step, gather
    try:
        return qsr_job(argv)[0], gathered
    finally:
        module._Run._step, figures.all_gather_flat = original, flat


def test_every_worker_tells_at_boundaries_how_it_fares(processes: Processes, recipe: Path) -> None:
    name, delay = "told", 0.15
    sets = [f"logging.name={name}", "logging.every=2", "qsr.total_steps=16", "logging.eval_every=16", "qsr.alpha=0"]
    argv = ["train", str(recipe), *[word for text in sets for word in ("--set", text)]]
    results = processes.run(slow_worker_job, ranks=2, argv=argv, slow=1, delay=delay)
    assert [code for code, _ in results] == [0, 0]
    run = recipe.parent / "runs" / name
    told = workers(run)
    assert results[0][1] == [True] * len(told)
    assert told[-1]["step"] == 16
    assert all(len(row[key]) == 2 for row in told for key in ("loss", "accuracy", "seconds_data", "seconds_waiting"))
    assert all(row["loss"][0] != row["loss"][1] for row in told), "each has batches of its own"
    waited = [sum(row["seconds_waiting"][worker] for row in told) for worker in (0, 1)]
    assert waited[0] > max(0.8 * 16 * delay, 3 * waited[1]), "worker 0 waits as long as worker 1 is slow"
    events = EventAccumulator(str(run / "tensorboard" / "worker-1")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("worker/loss")]
    assert shown == [(row["step"], pytest.approx(row["loss"][1])) for row in told]
    assert "worker 1 is slow throughout" in "".join(read_run(run).notes)


def test_a_run_writes_what_it_promises(processes: Processes, recipe: Path) -> None:
    run = train(processes, recipe, "logging.eval_first=true")
    first, *rows = records(run)
    assert (first["step"], first["loss"], first["train_accuracy"], first["averagings"]) == (0, None, None, 0)
    assert rows[-1]["step"] == STEPS
    assert [row["step"] for row in rows if row["eval_accuracy"] is not None][-1] == STEPS
    assert all(row["images_seen"] == 96 * row["step"] for row in rows)
    # 2 workers: a ring all-reduce sends the model once; `parallel` would have sent it at every step.
    payload = sum(tensor.numel() * 4 for tensor in load_file(run / "model.safetensors").values())
    assert rows[-1]["bytes_sent"] == pytest.approx(rows[-1]["averagings"] * payload, rel=0.02)  # alignment of buckets
    assert rows[-1]["averagings_percent"] == rows[-1]["communication_percent"] == 100 * rows[-1]["averagings"] / STEPS
    assert rows[-1]["bytes_percent"] == pytest.approx(rows[-1]["averagings_percent"], rel=0.02), "both in fp32"
    assert rows[-1]["relative_distance"] > 0
    times = [rows[-1][f"seconds_{part}"] for part in ("compute", "averaging", "data")]
    assert all(seconds > 0 for seconds in times)

    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["optimizer"]["gradient_clipping"] == 1.0
    assert resolved["qsr"]["averaging"]["wire_dtype"] == "fp32", "defaults are written down"

    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS
    evaluated = [row for row in (first, *rows) if row["eval_accuracy"] is not None]
    assert [row["step"] for row in evaluated] == [0, 5, 10, STEPS]
    for number, row in enumerate(evaluated):
        best = max(evaluated[: number + 1], key=lambda known: known["eval_accuracy"])
        assert (row["best_accuracy"], row["best_step"]) == (best["eval_accuracy"], best["step"])
        assert row["eval_accuracy"] < row["eval_top5_accuracy"] < 100
    for name in ("eval_accuracy", "eval_top5_accuracy", "eval_loss", "best_accuracy", "best_step"):
        assert summary[name] == evaluated[-1][name]
    last = workers(run)[-1]["accuracy"]
    assert summary["train_accuracy"] == pytest.approx(statistics.mean(last))
    assert all(0 < row["train_accuracy"] < 100 for row in rows)
    for name in ("gradient", "parameter", "exp_avg", "exp_avg_sq"):
        assert all(row[f"{name}_norm"] > 0 for row in rows), "with every record"

    events = EventAccumulator(str(run)).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if not tag.startswith("workers")}
    of_text = {tag for tag, name in TAGS.items() if name.startswith("tokens") or name in OF_TEXT}
    assert tags == set(TAGS) - NOT_TOLD - COUNTERS - of_text
    assert "total_steps: 14" in str(events.Tensors("recipe/text_summary")[0].tensor_proto)
    predicted = EventAccumulator(str(run / "tensorboard" / "predicted")).Reload()
    for tag in ("local_steps/period", "train/lr"):
        known = {event.step: event.value for event in events.Scalars(tag) if event.step}
        both = {event.step: event.value for event in predicted.Scalars(tag) if event.step in known}
        assert both == {step: pytest.approx(known[step]) for step in both}
        assert len(both) >= 3, "the run does what its recipe leads to"
    for tag in tags:
        field = TAGS[tag]
        written = [(event.step, event.value) for event in events.Scalars(tag)]
        told = [row for row in (first, *rows) if row[field] is not None]
        assert written == [(row["step"], pytest.approx(row[field])) for row in told]


def test_evaluated_and_saved_at_the_steps_that_the_recipe_says(processes: Processes, recipe: Path) -> None:
    """Inside rounds too; and training does not know of it, with dropout as well."""
    common = ["model.kwargs.drop_rate=0.2", "data.loader_processes=1"]
    alone = train(processes, recipe, *common, "logging.eval_every=null")
    more = ["logging.eval_first=true", "logging.eval_every=3", "logging.checkpoint_every=5", "logging.norms=false"]
    busy = train(processes, recipe, *common, *more)
    assert all(row["parameter_norm"] is None for row in records(busy))
    evaluated = [row["step"] for row in records(busy) if row["eval_accuracy"] is not None]
    assert evaluated == [0, 3, 6, 9, 12, STEPS]
    manifests = [json.loads(path.read_text()) for path in sorted(busy.glob("checkpoints/*/manifest.json"))]
    assert [manifest["step"] for manifest in manifests] == [5, 10]
    assert any(manifest["inside_round"] for manifest in manifests)
    first, second = (load_file(run / "model.safetensors") for run in (alone, busy))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("optimizer", "clipping"), [("AdamW", 0.5), ("SGD", 0.0)])
@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_a_recipe_trains_as_the_reference_does(
    processes: Processes, recipe: Path, engine: str, optimizer: str, clipping: float
) -> None:
    """Every part of a recipe that the loop must obey, against the simulation on the same batches.

    Bit for bit; but with DeepSpeed's clipping to 1e-5: it and torch's differ by 1e-6 of the norm.
    """
    options = {
        "AdamW": ["optimizer.betas=[0.8, 0.95]", "optimizer.eps=1e-6", "optimizer.weight_decay=0.3"],
        "SGD": ["optimizer.momentum=0.8", "optimizer.nesterov=true", "optimizer.weight_decay=0.01", "qsr.lr.peak=0.03"],
    }
    more = [
        f"engine={engine}",
        "label_smoothing=0.2",
        "batch.gradient_accumulation_steps=2",
        "seed=5",
        "qsr.total_steps=17",
    ]
    overrides = [f"optimizer.type={optimizer}", f"optimizer.gradient_clipping={clipping}", *options[optimizer], *more]
    run = train(processes, recipe, *overrides)
    found = torch.cat([tensor.flatten() for _, tensor in sorted(load_file(run / "model.safetensors").items())])

    resolved = load_recipe(run / "recipe.yaml")
    index = read_index(resolved.data.shards)
    shapes: dict[str, Any] = {"ranks": 2, "batch_size": 24, "seed": 5}
    streams = [
        TrainLoader(resolved.data.shards, index, resolved.data, rank=rank, **shapes).batches() for rank in range(2)
    ]

    def make_model() -> torch.nn.Module:
        torch.manual_seed(5)
        return create_model(resolved.model, index.class_count, resolved.data.image_size)

    def make_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        if optimizer == "AdamW":
            return torch.optim.AdamW(parameters, lr=0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
        return torch.optim.SGD(parameters, lr=0, momentum=0.8, nesterov=True, weight_decay=0.01)

    models, _ = reference.simulate(
        make_model,
        make_optimizer,
        lambda worker, step: [normalised(next(streams[worker])) for _ in range(2)],
        resolved.qsr.model_dump(exclude_none=True),
        workers=2,
        clip=clipping,
        loss=partial(torch.nn.functional.cross_entropy, label_smoothing=0.2),
    )
    oracle = torch.cat([tensor.flatten() for _, tensor in sorted(models[0].state_dict().items())])
    torch.testing.assert_close(found, oracle, rtol=0, atol=1e-5 if clipping and engine == "deepspeed" else 0.0)


def test_the_same_seed_gives_the_same_bits(processes: Processes, recipe: Path) -> None:
    states = [load_file(train(processes, recipe, f"seed={seed}") / "model.safetensors") for seed in (3, 3, 4)]
    first, second, other = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_resolved_recipe_runs_again_to_the_same_bits(processes: Processes, recipe: Path) -> None:
    run = train(processes, recipe)
    copy = recipe.parent / "again.yaml"
    copy.write_text((run / "recipe.yaml").read_text())
    again = train(processes, copy)
    first, second = load_file(run / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.fast_cells(3, of=7)
@pytest.mark.parametrize(
    "overrides",
    [
        ["qsr.strategy=parallel"],
        ["qsr.strategy=post_local", "qsr.switch_step=6"],
        ["qsr.strategy=swap", "qsr.switch_step=6"],
        ["batch.gradient_accumulation_steps=3", "qsr.worker_size=2"],
        [
            "model={name: torchvision/resnet18}",
            "batch.train_batch_size=24",
            "qsr.total_steps=3",
            "logging.eval_every=2",
        ],
        ["label_smoothing=0.1", "logging.tensorboard=false", "data.augment=none"],
        ["engine=fsdp", "qsr.strategy=parallel"],
        ["engine=fsdp", "qsr.strategy=post_local", "qsr.switch_step=6", "qsr.worker_size=2", "precision.dtype=bf16"],
        ["engine=fsdp", "qsr.worker_size=2", "fsdp.activation_checkpointing=true", "data.loader_processes=1"],
        [
            "engine=fsdp",
            "model={name: torchvision/resnet18}",
            "batch.train_batch_size=24",
            "qsr.total_steps=3",
            "logging.eval_every=2",
        ],
    ],
    ids=lambda overrides: " ".join(overrides[:2]) if "fsdp" in overrides[0] else overrides[0],
)
def test_recipes_train(processes: Processes, recipe: Path, overrides: list[str]) -> None:
    run = train(processes, recipe, *overrides)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == (3 if "qsr.total_steps=3" in overrides else STEPS)
    assert 0 <= summary["eval_accuracy"] <= 100
    assert summary["eval_loss"] is not None
    if "qsr.strategy=parallel" in overrides:
        assert summary["averagings_percent"] == summary["bytes_percent"] == 100


@pytest.mark.slow  # tests/unit/data/test_ring.py shows it of the batches
def test_loader_processes_change_nothing(processes: Processes, recipe: Path) -> None:
    states = [
        load_file(train(processes, recipe, f"data.loader_processes={count}") / "model.safetensors") for count in (0, 1)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_evaluation_is_that_of_the_saved_model_on_the_whole_split(processes: Processes, recipe: Path) -> None:
    """360 images over 3 ranks, in batches that do not divide them, against one process that evaluates them all."""
    more = ["batch.train_batch_size=21", "qsr.total_steps=40", "logging.eval_first=true"]
    run = train(processes, recipe, *more, ranks=3)
    summary = json.loads((run / "summary.json").read_text())
    resolved = load_recipe(run / "recipe.yaml")
    index = read_index(resolved.data.shards)
    torch.manual_seed(resolved.seed)
    model = create_model(resolved.model, index.class_count, resolved.data.image_size)
    batches = list(EvalLoader(resolved.data.shards, index, resolved.data, rank=0, ranks=1, batch_size=360))
    assert len(batches) == 1
    images, labels = normalised(batches[0])
    with torch.no_grad():
        untrained = torch.nn.functional.cross_entropy(model.eval()(images), labels)
        model.load_state_dict(load_file(run / "model.safetensors"))
        scores = model(images)
    assert records(run)[0]["step"] == 0
    assert records(run)[0]["eval_loss"] == pytest.approx(untrained.item(), rel=1e-5)
    assert summary["eval_accuracy"] == pytest.approx(100 * (scores.argmax(1) == labels).double().mean().item())
    among_five = (scores.argsort(1, descending=True)[:, :5] == labels[:, None]).any(1)
    assert summary["eval_top5_accuracy"] == pytest.approx(100 * among_five.double().mean().item())
    losses = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    # fp32 scores differ in the last bits between batch sizes.
    assert summary["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert summary["eval_loss"] != pytest.approx(losses[:120].mean().item(), rel=1e-5), "one rank's part is not enough"


@pytest.mark.parametrize("engine", [["precision.zero_stage=3"], ["engine=fsdp"]], ids=["zero3", "fsdp"])
def test_ranks_of_a_worker_evaluate_the_same_number_of_batches(
    processes: Processes, recipe: Path, engine: list[str]
) -> None:
    """718 and 719 images in batches of 359: the second rank has a batch more, and in it the first rank's part of the
    parameters must be gathered. It used to wait for ever."""
    overrides = ["data.eval=train", "batch.train_batch_size=718", "qsr.worker_size=2", "qsr.total_steps=2", *engine]
    summary = json.loads((train(processes, recipe, *overrides) / "summary.json").read_text())
    assert summary["eval_accuracy"] == pytest.approx(round(summary["eval_accuracy"] * 14.37) / 14.37), "of 1437 images"


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("digits*.yaml"))


@pytest.mark.fast_cells(2)
@pytest.mark.parametrize(
    ("path", "engine"),
    [(path, ("deepspeed", "fsdp")[number % 2]) for number, path in enumerate(CONFIGS)],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_every_recipe_runs(processes: Processes, digits: Path, tmp_path: Path, path: Path, engine: str) -> None:
    """Its first steps, by `qsr train RECIPE --engine ENGINE`; every other one on the other engine."""
    sets = ["epochs=null", "qsr.total_steps=3", "qsr.lr.warmup_epochs=null", f"data.shards={digits}"]
    sets += [f"logging.dir={tmp_path}", "logging.name=run"]
    words = [word for override in sets for word in ("--set", override)]
    for code, _, err in processes.run(qsr_job, argv=["train", str(path), "--engine", engine, *words]):
        assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["engine"], summary["steps"]) == (engine, 3)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["engine"] == engine


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("precision", [["bf16", 2], ["fp32", 3]])
def test_precision_and_zero_stage_of_a_recipe(processes: Processes, recipe: Path, precision: list[Any]) -> None:
    dtype, stage = precision
    run = train(
        processes, recipe, f"precision.dtype={dtype}", f"precision.zero_stage={stage}", "qsr.worker_size=2", ranks=4
    )
    assert records(run)[-1]["eval_loss"] > 0
    assert all(tensor.dtype == torch.float32 for tensor in load_file(run / "model.safetensors").values())


@pytest.mark.slow
def test_a_loader_that_is_faster_than_the_model_is_not_waited_for(processes: Processes, recipe: Path) -> None:
    """Under 2 % of a step, as records and TensorBoard say; the first steps wait for the loader process to start."""
    model = ["model.kwargs.embed_dim=192", "model.kwargs.depth=8", "model.kwargs.num_heads=3"]
    more = ["data.loader_processes=1", "batch.train_batch_size=64", "qsr.total_steps=14", "logging.every=1"]
    run = train(processes, recipe, *model, *more, ranks=1)
    waited = [row["data_percent"] for row in records(run)]
    assert statistics.median(waited[4:]) < 2
    events = EventAccumulator(str(run)).Reload().Scalars("data/waiting_percent")
    assert [event.value for event in events] == pytest.approx(waited)


@pytest.mark.fast_cells(0, of=2)
@pytest.mark.parametrize("engine", [["precision.zero_stage=3"], ["engine=fsdp"]], ids=["zero3", "fsdp"])
def test_sharpness_is_measured_on_the_averaged_model_and_changes_nothing(
    processes: Processes, recipe: Path, engine: list[str]
) -> None:
    plain, measured = (
        train(processes, recipe, "qsr.worker_size=2", "model.kwargs.drop_rate=0.2", *engine, *more)
        for more in ([], ["logging.sharpness_samples=96"])
    )
    one, other = (load_file(run / "model.safetensors") for run in (plain, measured))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [row["sharpness"] for row in records(plain)] == [None] * len(records(plain))
    found = [row["sharpness"] for row in records(measured) if row["eval_accuracy"] is not None]
    assert len(found) > 1

    resolved = load_recipe(measured / "recipe.yaml")
    index = read_index(resolved.data.shards)
    model = create_model(resolved.model, index.class_count, resolved.data.image_size)
    model.load_state_dict(other)
    data = resolved.data.model_copy(update={"augment": "none"})
    loader = TrainLoader(data.shards, index, data, rank=0, ranks=1, batch_size=48, seed=0)
    batches = [normalised(batch) for batch in islice(loader.batches(), 2)]
    expected = largest_eigenvalue(model.eval(), batches, torch.nn.functional.cross_entropy)
    assert found[-1] == pytest.approx(expected, rel=1e-4)
