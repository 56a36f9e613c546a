"""Training a recipe end to end: the `qsr train` of every rank, and a real `deepspeed` launch."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.data import read_index, write_digits
from qsr_engine.data.batches import ImageBatch
from qsr_engine.data.device import Normalise
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.data.order import seed_for
from qsr_engine.records.records import TAGS
from qsr_engine.records.runs import read_run
from qsr_engine.training.models import create_model
from qsr_engine.training.sharpness import largest_eigenvalue
from qsr_engine.training.vit import sincos_positions
from tests.support import reference
from tests.support.pool import Processes, free_port

STEPS = 14


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    """A recipe that trains in a second; one file, as a user writes it."""
    path = tmp_path / "small.yaml"
    path.write_text(f"""
model:
  name: timm/vit_tiny_patch16_224
  kwargs: {{img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}}
data: {{shards: "{digits}", image_size: 8, augment: crop}}
batch: {{train_batch_size: 96}}
optimizer: {{type: AdamW, weight_decay: 0.05, gradient_clipping: 1.0}}
qsr:
  strategy: qsr
  h_base: 2
  alpha: 0.006
  total_steps: {STEPS}
  lr: {{schedule: cosine, peak: 3e-3, warmup_steps: 2}}
logging: {{dir: "{tmp_path / "runs"}", every: 3, eval_every: 5}}
""")
    return path


def qsr_job(argv: list[str], per_rank: list[list[str]] | None = None) -> tuple[int, str, str]:
    """The `qsr` command of one rank: exit code, standard output, standard error."""
    from qsr_engine.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    extra = per_rank[int(os.environ["RANK"])] if per_rank else []
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*argv, *extra])
    return code, out.getvalue(), err.getvalue()


def train(processes: Processes, recipe: Path, *overrides: str, ranks: int = 2) -> Path:
    """Train, and give the run's folder back."""
    name = f"run-{len(list((recipe.parent / 'runs').glob('*')))}"
    sets = [word for override in (*overrides, f"logging.name={name}") for word in ("--set", override)]
    for code, _, err in processes.run(qsr_job, ranks=ranks, argv=["train", str(recipe), *sets]):
        assert code == 0, err
    return recipe.parent / "runs" / name


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def workers(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "workers.jsonl").read_text().splitlines()]


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
    assert all(len(row[key]) == 2 for row in told for key in ("loss", "seconds_data", "seconds_waiting"))
    assert all(row["loss"][0] != row["loss"][1] for row in told), "each has batches of its own"
    waited = [sum(row["seconds_waiting"][worker] for row in told) for worker in (0, 1)]
    assert waited[0] > max(0.8 * 16 * delay, 3 * waited[1]), "worker 0 waits as long as worker 1 is slow"
    events = EventAccumulator(str(run)).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("workers_loss/1")]
    assert shown == [(row["step"], pytest.approx(row["loss"][1])) for row in told]
    assert "worker 1 is slow throughout" in "".join(read_run(run).notes)


def test_a_run_writes_what_it_promises(processes: Processes, recipe: Path) -> None:
    run = train(processes, recipe)
    rows = records(run)
    assert rows[-1]["step"] == STEPS
    assert [row["step"] for row in rows if row["eval_accuracy"] is not None][-1] == STEPS
    assert all(row["images_seen"] == 96 * row["step"] for row in rows)
    # 2 workers: a ring all-reduce sends the model once; `parallel` would have sent it at every step.
    payload = sum(tensor.numel() * 4 for tensor in load_file(run / "model.safetensors").values())
    assert rows[-1]["bytes_sent"] == pytest.approx(rows[-1]["averagings"] * payload, rel=0.02)  # alignment of buckets
    assert rows[-1]["communication_percent"] == pytest.approx(100 * rows[-1]["averagings"] / STEPS, rel=0.02)
    assert rows[-1]["relative_distance"] > 0
    times = [rows[-1][f"seconds_{part}"] for part in ("compute", "averaging", "data")]
    assert all(seconds > 0 for seconds in times)

    resolved = yaml.safe_load((run / "recipe.yaml").read_text())
    assert resolved["optimizer"]["gradient_clipping"] == 1.0
    assert resolved["qsr"]["averaging"]["wire_dtype"] == "fp32", "defaults are written down"

    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["eval_accuracy"] == rows[-1]["eval_accuracy"]

    events = EventAccumulator(str(run)).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if not tag.startswith("workers")}
    assert tags == set(TAGS) - {"eval/sharpness"}
    for tag in tags:
        field = TAGS[tag]
        written = [(event.step, event.value) for event in events.Scalars(tag)]
        assert written == [(row["step"], pytest.approx(row[field])) for row in rows if row[field] is not None]


@pytest.mark.parametrize("clipping", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
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


def normalised(batch: ImageBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return Normalise(torch.device("cpu"), torch.float32)(batch.images), batch.labels


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


@pytest.mark.parametrize(
    "overrides",
    [
        ["qsr.strategy=parallel"],
        ["qsr.strategy=post_local", "qsr.switch_step=6"],
        ["qsr.strategy=swap", "qsr.switch_step=6"],
        ["precision.dtype=bf16", "precision.zero_stage=1"],
        ["precision.zero_stage=1", "optimizer.type=SGD", "optimizer.momentum=0.9"],
        ["batch.gradient_accumulation_steps=3", "qsr.worker_size=2"],
        ["data.loader_processes=2"],
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
        assert summary["communication_percent"] == 100


def test_loader_processes_change_nothing(processes: Processes, recipe: Path) -> None:
    states = [
        load_file(train(processes, recipe, f"data.loader_processes={count}") / "model.safetensors") for count in (0, 1)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_evaluation_is_that_of_the_saved_model_on_the_whole_split(processes: Processes, recipe: Path) -> None:
    """360 images over 3 ranks, in batches that do not divide them, against one process that evaluates them all."""
    run = train(processes, recipe, "batch.train_batch_size=21", "qsr.total_steps=40", ranks=3)
    summary = json.loads((run / "summary.json").read_text())
    resolved = load_recipe(run / "recipe.yaml")
    index = read_index(resolved.data.shards)
    model = create_model(resolved.model, index.class_count, resolved.data.image_size)
    model.load_state_dict(load_file(run / "model.safetensors"))
    batches = list(EvalLoader(resolved.data.shards, index, resolved.data, rank=0, ranks=1, batch_size=360))
    assert len(batches) == 1
    images, labels = normalised(batches[0])
    with torch.no_grad():
        scores = model.eval()(images)
    assert summary["eval_accuracy"] == pytest.approx(100 * (scores.argmax(1) == labels).double().mean().item())
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


CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_runs_on_both_engines(
    processes: Processes, digits: Path, tmp_path: Path, path: Path, engine: str
) -> None:
    """Its first steps, by `qsr train RECIPE --engine ENGINE`."""
    sets = ["epochs=null", "qsr.total_steps=3", "qsr.lr.warmup_epochs=null", f"data.shards={digits}"]
    sets += [f"logging.dir={tmp_path}", "logging.name=run"]
    words = [word for override in sets for word in ("--set", override)]
    for code, _, err in processes.run(qsr_job, argv=["train", str(path), "--engine", engine, *words]):
        assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["engine"], summary["steps"]) == (engine, 3)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["engine"] == engine


# -------------------------------------------------------------------------------------------- bad input


def refusals(processes: Processes, recipe: Path, *overrides: str, per_rank: Any = None, ranks: int = 2) -> list[str]:
    """What each rank says when it refuses to train; every one must, in under 60 s."""
    sets = [word for override in overrides for word in ("--set", override)]
    results = processes.run(qsr_job, ranks=ranks, seconds=60, argv=["train", str(recipe), *sets], per_rank=per_rank)
    assert all(code == 2 for code, _, _ in results), results
    return [err for _, _, err in results]


def test_ranks_with_different_recipes(processes: Processes, recipe: Path) -> None:
    for key, one, other in (
        ("qsr.alpha", "0.006", "0.007"),
        ("seed", "0", "1"),
        ("optimizer.weight_decay", "0.05", "0.1"),
        ("data.augment", "'crop'", "'none'"),
    ):
        per_rank = [[], ["--set", f"{key}={other}"]]
        for said in refusals(processes, recipe, per_rank=per_rank):
            assert f"{key}: {one} on rank 0; {other} on rank 1" in said
    assert not (recipe.parent / "runs").exists(), "nothing was written before the ranks agreed"


def test_ranks_with_different_data(processes: Processes, recipe: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "other", seed=1)
    for said in refusals(processes, recipe, per_rank=[[], ["--set", f"data.shards={tmp_path / 'other'}"]]):
        assert "data: " in said
        assert "on rank 1" in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("qsr.worker_size=3", "worker_size is 3 and there are 2 ranks"),
        ("batch.train_micro_batch_size_per_gpu=7", "train_batch_size is 96, but"),
        ("batch.train_batch_size=1438", "fewer than one batch"),
        ("model.name=timm/vit_tiny_patch16_225", "did you mean timm/vit_tiny_patch16_224"),
        ("model.kwargs.num_classes=5", "num_classes is 5, and the data has 10 classes"),
        ("model.kwargs.img_sise=8", "model.kwargs: timm/vit_tiny_patch16_224 does not take"),
        ("data.image_size=9", "does not take images of shape (1, 3, 9, 9)"),
        ("data.train=trian", "did you mean 'train'"),
        ("data.shards=/nowhere", "index is missing"),
        ("engine=fspd", "engine: found 'fspd'"),
    ],
)
def test_what_cannot_run_is_refused(processes: Processes, recipe: Path, override: str, words: str) -> None:
    for said in refusals(processes, recipe, override):
        assert said.startswith("qsr: error (rank ")
        assert words in said


def test_a_folder_that_holds_a_run_is_refused(processes: Processes, recipe: Path) -> None:
    run = train(processes, recipe, "qsr.total_steps=2")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir())
    (said,) = refusals(processes, recipe, f"logging.name={run.name}", ranks=1)
    assert "this folder already holds" in said
    assert "--set logging.name=NAME" in said
    assert sorted((path.name, path.stat().st_mtime_ns) for path in run.iterdir()) == before


def test_a_truncated_shard_is_refused_before_training(processes: Processes, recipe: Path, tmp_path: Path) -> None:
    write_digits(tmp_path / "torn")
    shard = tmp_path / "torn" / "train-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    for said in refusals(processes, recipe, f"data.shards={tmp_path / 'torn'}"):
        assert "train-000003.tar" in said
        assert "truncated" in said


# --------------------------------------------------------------------------------------- the real launcher


def launch(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180, check=False)


def bin_folder() -> Path:
    return Path(sys.executable).parent


def test_a_real_deepspeed_launch(recipe: Path, tmp_path: Path) -> None:
    deepspeed = [str(bin_folder() / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    done = launch(*deepspeed, "--module", "qsr_engine", "train", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS}/{STEPS}" in done.stdout
    run = tmp_path / "runs" / "small"
    assert json.loads((run / "summary.json").read_text())["ranks"] == 2
    report = launch(str(bin_folder() / "qsr"), "report", str(run), cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert "qsr H>=2 alpha=0.006" in report.stdout


def test_qsr_train_starts_torchrun_for_fsdp(recipe: Path, tmp_path: Path) -> None:
    """Two workers of two ranks, with checkpoints; the report reads the run, and `qsr export` the checkpoint."""
    command = [str(bin_folder() / "qsr"), "train", str(recipe), "--engine", "fsdp", "--ranks", "4"]
    done = launch(*command, "--set", "qsr.worker_size=2", "--set", "logging.checkpoint_every=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["ranks"], summary["worker_size"], summary["engine"]) == (4, 2, "fsdp")
    report = launch(str(bin_folder() / "qsr"), "report", str(run), cwd=tmp_path)
    assert "qsr H>=2 alpha=0.006" in report.stdout, report.stderr
    out = tmp_path / "out.safetensors"
    export = launch(str(bin_folder() / "qsr"), "export", str(run / "checkpoints"), str(out), cwd=tmp_path)
    assert export.returncode == 0, export.stderr
    assert set(load_file(out)) == set(load_file(run / "model.safetensors"))


LAUNCH = Path(__file__).parents[2] / "launch"


def start_script(*words: str, **environment: str) -> subprocess.Popen[str]:
    """A script of launch/, with this Python's programs in the path and the recipe's model on a CPU."""
    path = f"{bin_folder()}{os.pathsep}{os.environ['PATH']}"
    known = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path, **environment}
    return subprocess.Popen(words, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_torchrun_on_two_hosts(recipe: Path) -> None:
    """Two agents that meet by c10d rendezvous, here both on this host; two workers of one rank each."""
    several = {"HOSTS": "2", "RENDEZVOUS": f"127.0.0.1:{free_port()}"}
    words = [str(LAUNCH / "torchrun.sh"), "1", str(recipe), "--engine", "fsdp"]
    agents = [start_script(*words, **several) for _ in range(2)]
    said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    summary = json.loads((recipe.parent / "runs" / "small" / "summary.json").read_text())
    assert (summary["ranks"], summary["engine"]) == (2, "fsdp")


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes. Its programs are stand-ins, as there is no SLURM here: srun starts the
    command once for every node, and scontrol notes what it is asked to requeue."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    srun = '#!/usr/bin/env bash\nshift\nfor node in $(seq $SLURM_NNODES); do "$@" & all+=($!); done\n'
    (stand_ins / "srun").write_text(srun + "for one in ${all[@]}; do wait $one || exit 1; done\n")
    requeue = f'[ "$1" = requeue ] && exec echo "$2" >>{tmp_path}/requeued'
    (stand_ins / "scontrol").write_text(f"#!/usr/bin/env bash\n{requeue}\nprintf '127.0.0.1\\nother\\n'\n")
    for program in stand_ins.iterdir():
        program.chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "RANKS_PER_NODE": "1"}
    path = os.pathsep.join([str(stand_ins), str(bin_folder()), os.environ["PATH"]])
    return job | {"PORT": str(free_port()), "PATH": path}


def test_slurm(recipe: Path, slurm: dict[str, str]) -> None:
    words = [str(LAUNCH / "slurm.sh"), str(recipe), "--engine", "fsdp", "--set", "logging.checkpoint_every=4"]
    process = start_script(*words, **slurm)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    run = recipe.parent / "runs" / "small"
    assert json.loads((run / "summary.json").read_text())["ranks"] == 2
    assert list((run / "checkpoints").glob("step-*")), "so that a requeued job goes on"
    assert not (recipe.parent / "requeued").exists()


def test_a_preempted_slurm_job_is_requeued(recipe: Path, slurm: dict[str, str]) -> None:
    """SLURM sends SIGUSR1 to the step's tasks, which are torchrun's agents, some time before it kills them."""
    words = [str(LAUNCH / "slurm.sh"), str(recipe), "--engine", "fsdp", "--set", "qsr.total_steps=1000000"]
    run = recipe.parent / "runs" / "small"
    process = start_script(*words, **slurm)
    end = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
        assert time.monotonic() < end, "no step in time"
        time.sleep(0.05)  # between looks at a file, which nobody announces
    tasks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "torchrun" in child.cmdline()[1]
    ]
    assert len(tasks) == 2
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert (recipe.parent / "requeued").read_text() == "7\n"
    assert "the run was asked to stop, and has stopped after step" in said
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


def test_qsr_train_starts_the_launcher_and_passes_on_its_exit_code(recipe: Path, tmp_path: Path) -> None:
    """A sample without a label, on whichever rank reads it: the run ends with the shard and the key, and not 0."""
    write_digits(tmp_path / "data")
    _spoil(tmp_path / "data")
    command = [str(bin_folder() / "qsr"), "train", str(recipe), "--ranks", "2"]
    done = launch(*command, "--set", f"data.shards={tmp_path / 'data'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "train-000002.tar" in done.stderr
    assert "has no label" in done.stderr
    assert f"step {STEPS}/" not in done.stdout
    assert "Traceback" not in done.stderr


@contextlib.contextmanager
def endless_training(
    recipe: Path, engine: str = "deepspeed"
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """`qsr train` of a run that would take hours, once its first steps are done, and all processes below it."""
    command = [str(bin_folder() / "qsr"), "train", str(recipe), "--ranks", "2", "--set", "qsr.total_steps=1000000"]
    command += ["--engine", engine]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(command, cwd=recipe.parent, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step ")
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= (4 if engine == "deepspeed" else 3), "two ranks, and DeepSpeed's two launchers or torchrun"
        try:
            yield process, below
        finally:
            process.terminate()


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_a_terminated_qsr_train_leaves_no_process_behind(recipe: Path, engine: str) -> None:
    with endless_training(recipe, engine) as (process, below):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75, "it has saved"
        _, alive = psutil.wait_procs(below, timeout=10)
        assert alive == []
    assert len(list((recipe.parent / "runs" / "small" / "checkpoints").glob("step-*"))) == 1


def test_an_interrupted_qsr_train_ends_at_once(recipe: Path) -> None:
    with endless_training(recipe) as (process, below):
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
        _, alive = psutil.wait_procs(below, timeout=10)
        assert alive == []
    assert not (recipe.parent / "runs" / "small" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("engine", "victim"),
    [
        ("deepspeed", "rank 1"),
        ("deepspeed", "deepspeed.launcher.launch"),
        ("deepspeed", "deepspeed.launcher.runner"),
        ("fsdp", "rank 1"),
        ("fsdp", "torch.distributed.run"),
    ],
)
def test_a_killed_process_ends_the_run_with_an_error(recipe: Path, engine: str, victim: str) -> None:
    with endless_training(recipe, engine) as (process, below):
        if victim == "rank 1":
            next(child for child in below if child.environ().get("RANK") == "1").kill()
        else:
            next(child for child in below if victim in child.cmdline()).kill()
        assert process.wait(timeout=60) != 0
        _, alive = psutil.wait_procs(below, timeout=10)
        assert alive == []


def test_a_loss_that_is_not_finite_ends_the_run(processes: Processes, recipe: Path) -> None:
    overrides = ["optimizer.type=SGD", "qsr.strategy=parallel", "qsr.lr.peak=1e30", "optimizer.gradient_clipping=0"]
    (said,) = refusals(processes, recipe, *overrides, ranks=1)
    assert "the loss is nan" in said
    assert "lower qsr.lr.peak" in said


def _spoil(folder: Path) -> None:
    """Rename one .cls member of one shard in place, so that its size and the index stay right."""
    shard = folder / "train-000002.tar"
    data = shard.read_bytes()
    at = data.index(b".cls\0")
    header = bytearray(data[at - at % 512 : at - at % 512 + 512])
    place = header.index(b".cls")
    header[place : place + 4] = b".txt"
    header[148:156] = b" " * 8  # the checksum counts its own field as blanks
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    start = at - at % 512
    shard.write_bytes(data[:start] + bytes(header) + data[start + 512 :])


# -------------------------------------------------------------------------------- checkpoints of `qsr train`


def interrupted_job(argv: list[str], at_step: int) -> int:
    """The `qsr train` of one rank that dies in the middle of a round."""
    from qsr_engine.training import loop as module

    original = module._Run._step

    def step(run: Any) -> bool:
        if run.engine.local_steps.step == at_step:
            raise KeyboardInterrupt
        return original(run)

    module._Run._step = step  # type: ignore[assignment,method-assign]
    try:
        return qsr_job(argv)[0]
    finally:
        module._Run._step = original  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "precision",
    [[], ["precision.dtype=bf16", "precision.zero_stage=3"], ["engine=fsdp"], ["engine=fsdp", "precision.dtype=bf16"]],
    ids=["fp32", "zero3", "fsdp", "fsdp-bf16"],
)
def test_a_run_that_died_is_resumed_to_the_same_bits(processes: Processes, recipe: Path, precision: list[str]) -> None:
    """With dropout, so that the random states matter; with a loader process; and records that continue."""
    more = ["model.kwargs.drop_rate=0.2", "data.loader_processes=1", "logging.checkpoint_every=4", "qsr.total_steps=18"]
    overrides = [*more, *precision, "batch.gradient_accumulation_steps=2"]
    whole = train(processes, recipe, *overrides)
    assert len(list((whole / "checkpoints").glob("step-*"))) > 1

    sets = [word for override in (*overrides, "logging.name=died") for word in ("--set", override)]
    argv = ["train", str(recipe), *sets]
    assert processes.run(interrupted_job, argv=argv, at_step=11) == [130, 130]
    died = recipe.parent / "runs" / "died"
    assert not (died / "summary.json").exists()
    with (died / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # a line that was being written
    for words, changed in (
        ("seed was 0 and is 7", ["--set", "seed=7"]),
        ("qsr.lr.peak was 0.003 and is 0.5", ["--set", "qsr.lr.peak=0.5"]),
    ):
        for code, _, err in processes.run(qsr_job, argv=[*argv, *changed, "--resume"]):
            assert code == 2
            assert words in err
    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume"]):
        assert code == 0, err

    first, second = (load_file(run / "model.safetensors") for run in (whole, died))
    assert all(torch.equal(first[name], second[name]) for name in first)
    timed = {"seconds_compute", "seconds_averaging", "seconds_data", "images_per_second", "data_percent"}
    rows = [[{k: v for k, v in row.items() if k not in timed} for row in records(run)] for run in (whole, died)]
    assert rows[0] == rows[1]
    told = [[(row["step"], row["loss"]) for row in workers(run)] for run in (whole, died)]
    assert told[0] == told[1], "what the workers told since the last time goes on too"
    steps = [event.step for event in EventAccumulator(str(died)).Reload().Scalars("train/loss")]
    assert steps == [row["step"] for row in rows[0]], "TensorBoard shows every record once"

    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume"]):
        assert code == 2
        assert "this run is finished" in err


def test_resume_begins_where_there_is_no_checkpoint(processes: Processes, recipe: Path) -> None:
    argv = ["train", str(recipe), "--set", "logging.name=early"]
    assert processes.run(interrupted_job, argv=argv, at_step=4) == [130, 130]
    (recipe.parent / "runs" / "early" / "checkpoints" / ".step-00000004.tmp").mkdir(parents=True)  # killed in a save
    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume"]):
        assert code == 0, err
    again = train(processes, recipe)
    first, second = (load_file(run / "model.safetensors") for run in (recipe.parent / "runs" / "early", again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_export_writes_what_timm_loads(processes: Processes, recipe: Path, tmp_path: Path) -> None:
    import timm

    from qsr_engine.cli.main import main

    run = train(processes, recipe, "logging.checkpoint_every=1")
    out = tmp_path / "out.safetensors"
    assert main(["export", str(run / "checkpoints"), str(out)]) == 0
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        embed_dim=16,
        depth=1,
        num_heads=2,
        num_classes=10,
        checkpoint_path=str(out),
    )
    exported = load_file(out)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in model.state_dict().items())
    assert main(["export", str(tmp_path), str(out)]) == 2


@pytest.mark.parametrize("precision", [["bf16", 2], ["fp32", 3], ["bf16", 0]])
def test_precision_and_zero_stage_of_a_recipe(processes: Processes, recipe: Path, precision: list[Any]) -> None:
    dtype, stage = precision
    run = train(
        processes, recipe, f"precision.dtype={dtype}", f"precision.zero_stage={stage}", "qsr.worker_size=2", ranks=4
    )
    assert records(run)[-1]["eval_loss"] > 0
    assert all(tensor.dtype == torch.float32 for tensor in load_file(run / "model.safetensors").values())


def test_a_folder_in_which_another_process_trains_is_refused(
    processes: Processes, recipe: Path, tmp_path: Path
) -> None:
    """A launcher that is killed can leave its ranks behind, and `--resume` would write between their lines."""
    from qsr_engine.records.run_folder import lock_run_folder

    name = ["--set", "logging.name=held"]
    (tmp_path / "runs" / "held").mkdir(parents=True)
    lock = lock_run_folder(tmp_path / "runs" / "held")
    assert lock is not None
    code, _, err = processes.run(qsr_job, ranks=1, argv=["train", str(recipe), "--resume", *name])[0]
    assert code == 2
    assert "another process trains in this folder" in err
    lock.close()
    assert processes.run(qsr_job, ranks=1, argv=["train", str(recipe), "--resume", *name])[0][0] == 0


def test_a_loader_that_is_faster_than_the_model_is_not_waited_for(processes: Processes, recipe: Path) -> None:
    """Under 2 % of a step, as records and TensorBoard say; the first steps wait for the loader process to start."""
    model = ["model.kwargs.embed_dim=192", "model.kwargs.depth=8", "model.kwargs.num_heads=3"]
    more = ["data.loader_processes=1", "batch.train_batch_size=64", "qsr.total_steps=14", "logging.every=1"]
    run = train(processes, recipe, *model, *more, ranks=1)
    waited = [row["data_percent"] for row in records(run)]
    assert statistics.median(waited[4:]) < 2
    events = EventAccumulator(str(run)).Reload().Scalars("data/waiting_percent")
    assert [event.value for event in events] == pytest.approx(waited)


# ------------------------------------------------------------------------------------------------- batch norm

NORMED = [
    "model={name: timm/test_resnet, kwargs: {drop_rate: 0.2}}",
    "data.image_size=16",
    "batch.train_batch_size=32",
    "batch_norm={batches: 5, batch_size: 8}",
    "qsr.strategy=constant",
    "qsr.total_steps=6",
]


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def batch_statistics(run: Path, state: dict[str, torch.Tensor], step: int, ranks: int) -> dict[str, torch.Tensor]:
    """Mean and unbiased variance of what every batch norm reads, by hand: the mean over three batches and all ranks."""
    resolved = load_recipe(run / "recipe.yaml")
    index = read_index(resolved.data.shards)
    model = create_model(resolved.model, index.class_count, resolved.data.image_size)
    model.load_state_dict(state)
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, inputs: torch.Tensor) -> None:
        seen.setdefault(f"{name}.running_mean", []).append(inputs.mean((0, 2, 3)))
        seen.setdefault(f"{name}.running_var", []).append(inputs.var((0, 2, 3), unbiased=True))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, inputs, name=name: watch(name, inputs[0]))
    seed = seed_for("batch norm", resolved.seed, step)
    for rank in range(ranks):
        loader = TrainLoader(
            resolved.data.shards, index, resolved.data, rank=rank, ranks=ranks, batch_size=8, seed=seed
        )
        for batch in islice(loader.batches(), 3):  # 5 batches do not divide by 2 ranks
            with torch.no_grad():
                model.train()(normalised(batch)[0])
    return {name: torch.stack(values).mean(0) for name, values in seen.items()}


@pytest.mark.parametrize(
    "engine",
    [
        [],
        ["precision.zero_stage=3", "qsr.worker_size=2"],
        ["engine=fsdp", "qsr.worker_size=2"],
        ["engine=fsdp", "model.channels_last=true"],
    ],
    ids=["deepspeed", "zero3", "fsdp", "fsdp-one-rank"],
)
def test_batch_norm_is_estimated_anew_and_training_is_left_alone(
    processes: Processes, recipe: Path, engine: list[str]
) -> None:
    """Evaluated at every boundary with the block, and at the end only without it: the same parameters, also with
    dropout, which draws random numbers in training and while statistics are estimated."""
    run = train(processes, recipe, *NORMED, *engine, "logging.eval_every=1")
    without = train(processes, recipe, *NORMED, *engine, "batch_norm=null", "logging.eval_every=6")
    model, plain = (load_file(run / "model.safetensors") for run in (run, without))
    assert all(torch.equal(model[name], plain[name]) for name in model if not is_statistic(name))
    expected = batch_statistics(run, model, step=6, ranks=2)
    assert {*expected} == {name for name in model if is_statistic(name) and "tracked" not in name}
    for name, value in expected.items():
        torch.testing.assert_close(model[name], value, rtol=1e-4, atol=1e-5)
    far = [name for name in expected if not torch.allclose(plain[name], expected[name], rtol=0.05, atol=0.01)]
    assert len(far) > len(expected) / 2, "those that training keeps are others"


def test_the_model_with_batch_norm_that_is_saved_is_the_one_that_was_evaluated(
    processes: Processes, recipe: Path
) -> None:
    """And its statistics do not depend on how often it was evaluated before."""
    run = train(processes, recipe, *NORMED, "logging.eval_every=2")
    other = train(processes, recipe, *NORMED)
    first, second = (load_file(run / "model.safetensors") for run in (run, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    resolved = load_recipe(run / "recipe.yaml")
    index = read_index(resolved.data.shards)
    model = create_model(resolved.model, index.class_count, resolved.data.image_size)
    model.load_state_dict(load_file(run / "model.safetensors"))
    (batch,) = EvalLoader(resolved.data.shards, index, resolved.data, rank=0, ranks=1, batch_size=360)
    images, labels = normalised(batch)
    with torch.no_grad():
        scores = model.eval()(images)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss"] == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item(), rel=1e-4)


def test_a_checkpoint_has_both_the_statistics_of_training_and_those_of_the_averaged_model(
    processes: Processes, recipe: Path, tmp_path: Path
) -> None:
    """A run that died resumes to the same bits; `qsr export` gives what an evaluation would have measured. The run has
    two parameter groups as well."""
    more = [*NORMED, "logging.checkpoint_every=3", "optimizer.decay_norms_and_biases=false"]
    whole = train(processes, recipe, *more)
    other = train(processes, recipe, *more, "batch_norm=null")
    argv = ["train", str(recipe), "--set", "logging.name=died"]
    argv += [word for override in more for word in ("--set", override)]
    assert processes.run(interrupted_job, argv=argv, at_step=5) == [130, 130]
    for code, _, err in processes.run(qsr_job, argv=[*argv, "--resume"]):
        assert code == 0, err
    first, second = (load_file(run / "model.safetensors") for run in (whole, recipe.parent / "runs" / "died"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    (tag,) = [path.name for path in (whole / "checkpoints").glob("step-*")]
    own = [run / "checkpoints" / tag / "worker-00001" / "rank-00001.pt" for run in (whole, other)]
    states = [torch.load(path, weights_only=True) for path in own]
    assert states[0]["buffers"]
    assert all(torch.equal(a, b) for a, b in zip(states[0]["buffers"], states[1]["buffers"], strict=True))
    assert torch.equal(states[0]["random"]["torch"], states[1]["random"]["torch"])

    from qsr_engine.cli.main import main

    out = tmp_path / "out.safetensors"
    assert main(["export", str(whole / "checkpoints" / tag), str(out)]) == 0
    exported = load_file(out)
    for name, value in batch_statistics(whole, exported, step=int(tag[-8:]), ranks=2).items():
        torch.testing.assert_close(exported[name], value, rtol=1e-4, atol=1e-5)


def test_a_model_without_batch_norm_needs_no_block(processes: Processes, recipe: Path) -> None:
    for said in refusals(processes, recipe, "batch_norm={batches: 4}"):
        assert "batch_norm is given, and timm/vit_tiny_patch16_224 has no batch norm" in said


# ------------------------------------------------------------------------------- weight decay, the plain ViT


@pytest.mark.parametrize(
    "engine",
    [[], ["precision.zero_stage=1"], ["precision.zero_stage=3"], ["engine=fsdp"]],
    ids=["deepspeed", "zero1", "zero3", "fsdp"],
)
def test_no_weight_decay_on_norms_and_biases(processes: Processes, recipe: Path, engine: list[str]) -> None:
    """Bit for bit what the simulation gives with the two groups; so the learning rate reaches both of them."""
    decay = ["optimizer.weight_decay=0.5", "optimizer.gradient_clipping=0"]
    run = train(processes, recipe, *decay, *engine, "optimizer.decay_norms_and_biases=false")
    resolved = load_recipe(run / "recipe.yaml")
    index = read_index(resolved.data.shards)
    streams = [
        TrainLoader(resolved.data.shards, index, resolved.data, rank=rank, ranks=2, batch_size=48, seed=0).batches()
        for rank in range(2)
    ]

    def make_model() -> torch.nn.Module:
        torch.manual_seed(0)
        return create_model(resolved.model, index.class_count, resolved.data.image_size)

    def make_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        names = [name for name, _ in make_model().named_parameters()]
        alone = [number for number, name in enumerate(names) if "norm" in name or name.endswith("bias")]
        groups = [
            {"params": [p for number, p in enumerate(parameters) if number not in alone], "weight_decay": 0.5},
            {"params": [parameters[number] for number in alone], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0)

    models, _ = reference.simulate(
        make_model,
        make_optimizer,
        lambda worker, step: [normalised(next(streams[worker]))],
        resolved.qsr.model_dump(exclude_none=True),
        workers=2,
        clip=0.0,
        loss=torch.nn.functional.cross_entropy,
    )
    found = load_file(run / "model.safetensors")
    for name, value in models[0].state_dict().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    "engine",
    [
        ["precision.zero_stage=1"],
        ["precision.zero_stage=3", "qsr.worker_size=2"],
        ["engine=fsdp"],
        ["engine=fsdp", "qsr.worker_size=2"],
    ],
    ids=["zero1", "zero3", "fsdp-one-rank", "fsdp"],
)
def test_the_plain_vit_trains_in_bf16(processes: Processes, recipe: Path, engine: list[str]) -> None:
    kwargs = "{img_size: 8, patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}"
    model = f"model={{name: qsr/vit_base_patch16_sincos, kwargs: {kwargs}}}"
    run = train(processes, recipe, model, "precision.dtype=bf16", *engine, "logging.eval_every=7")
    saved = load_file(run / "model.safetensors")
    assert torch.equal(saved["pos_embed"], sincos_positions(2, 2, 16)), "neither trained nor rounded"
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def meta_job() -> dict[str, torch.Tensor]:
    from qsr_engine import initialize_fsdp
    from qsr_engine.training.vit import PlainViT, fill

    torch.manual_seed(int(os.environ["RANK"]))
    with torch.device("meta"):
        model = PlainViT(img_size=8, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    lr = {"schedule": "constant", "peak": 1e-3}
    engine = initialize_fsdp(
        model=model,
        optimizer=torch.optim.AdamW,
        init=fill,
        config={
            "train_batch_size": 4,
            "bf16": {"enabled": True},
            "qsr": {"strategy": "constant", "h_base": 1, "total_steps": 2, "worker_size": 2, "lr": lr},
        },
    )
    begun = engine.averaged_state_dict()
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 3, 8, 8)).float().square().mean())
        engine.step()
    trained = engine.averaged_state_dict()
    return {"begun": begun["blocks.1.mlp.fc1.weight"].std(), **trained} if begun else {}


def test_the_plain_vit_is_made_block_by_block(processes: Processes) -> None:
    state, _ = processes.run(meta_job)
    assert torch.equal(state["pos_embed"], sincos_positions(2, 2, 64))
    assert state["begun"].item() == pytest.approx(0.02, rel=0.1), "as timm begins"
    assert all(bool(value.isfinite().all()) for value in state.values())


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
