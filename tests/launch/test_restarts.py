"""Runs that go on by themselves after a rank has died, by torchrun's elastic agent; and with other numbers of ranks."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from qsr_engine.checkpoint.find import find_alone
from qsr_engine.cli.launched import hopeless
from qsr_engine.cli.main import main
from qsr_engine.config.batch import Batch
from qsr_engine.config.recipe_batch import batch_on_other_ranks
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.membership.signals import STOPPED
from qsr_engine.records.runs import read_run
from qsr_engine.training.saving import UnsavedError
from tests.support.launch import interrupted_job, qsr_job, started_in, variables_of
from tests.support.pool import Processes, free_port, rank_environment, undo
from tests.support.recipes import TINY_MODEL

pytestmark = pytest.mark.launch

LIMIT = 150.0  # seconds, for anything that is waited for


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    """A few seconds long, so that a rank can be killed in the middle; a checkpoint at every boundary."""
    path = tmp_path / "small.yaml"
    path.write_text(f"""{TINY_MODEL}
engine: fsdp
data: {{shards: "{digits}", image_size: 8, augment: crop}}
batch: {{train_batch_size: 24}}
optimizer: {{type: AdamW, gradient_clipping: 1.0}}
qsr:
  strategy: constant
  h_base: 8
  total_steps: 400
  lr: {{schedule: cosine, peak: 1e-3}}
  faults: {{timeout_seconds: 10}}
logging:
  dir: "{tmp_path / "runs"}"
  name: run
  every: 1
  checkpoint_every: 8
  keep_checkpoints: 3
  tensorboard: false
""")
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with started_in(tmp_path, LIMIT, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as start:  # as launch/torchrun.sh says it
        yield start


def qsr(recipe: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "qsr_engine", "train", str(recipe), "--ranks", "2", *words]


def wait_for(what: str, found: Callable[[], Any]) -> Any:
    end = time.monotonic() + LIMIT
    while not (value := found()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)  # between looks at files, which nobody announces
    return value


def records(recipe: Path) -> list[dict[str, Any]]:
    return whole_lines(recipe.parent / "runs" / "run" / "metrics.jsonl")


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Of a file that may be written just now."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def rank_process(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    below = psutil.Process(process.pid).children(recursive=True)
    return next(child for child in below if variables_of(child).get("RANK") == str(rank))


@pytest.mark.slow
def test_a_restarted_run_ends_as_an_undisturbed_one(
    processes: Processes, recipe: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """torchrun starts both engines again in the same way; that each resumes to the same bits is in tests/ranks."""
    words = ["--set", "qsr.total_steps=80"]
    process = start(*qsr(recipe, *words, "--restarts", "1"))
    wait_for("a step after a checkpoint", lambda: len(records(recipe)) > 20)
    rank_process(process, 1).kill()
    undisturbed = ["train", str(recipe), *words, "--set", "logging.name=other"]
    for code, _, err in processes.run(qsr_job, argv=undisturbed):
        assert code == 0, err
    assert process.wait(LIMIT) == 0, (recipe.parent / "output-0").read_text()
    assert [record["step"] for record in records(recipe)] == list(range(1, 81)), "every one once"
    models = [(recipe.parent / "runs" / name / "model.safetensors").read_bytes() for name in ("run", "other")]
    assert models[0] == models[1]


def restarted_job(argv: list[str], stopped: str) -> list[tuple[int, str, str]]:
    """A rank that torchrun starts, and starts again when it has failed: whatever the exit code is."""
    told = {"QSR_ENGINE_LAUNCH": "x", "QSR_STOPPED_FILE": stopped}
    undo.enter_context(mock.patch.dict(os.environ, told))
    first = qsr_job(argv)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    return [first, qsr_job(argv)]


def test_what_would_fail_again_is_not_tried_again(processes: Processes, recipe: Path, tmp_path: Path) -> None:
    """The loss is soon infinite; a second attempt ends before it loads anything."""
    words = ["--set", "optimizer={type: SGD}", "--set", "qsr.lr.peak=1e30"]
    argv = ["train", str(recipe), *words]
    attempts = zip(*processes.run(restarted_job, argv=argv, stopped=str(tmp_path / "stopped")), strict=True)
    (first, out), (second, out_again) = (([code for code, *_ in all_], all_) for all_ in attempts)
    assert (first, second) == ([1, 1], [1, 1])
    why = "".join(err for _, _, err in out)
    assert why.count("the loss is nan") == 1, "one rank says it for both"
    again = "".join(err for _, _, err in out_again)
    assert "not started again, since the same would happen: the loss is nan" in again
    assert all("step 1/400" not in said for _, said, _ in out_again)


def test_restarts_need_checkpoints(recipe: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(*qsr(recipe, "--restarts", "1", "--set", "logging.checkpoint_every=null"))
    assert process.wait(LIMIT) == 1
    assert "logging.checkpoint_every is not given" in (recipe.parent / "output-0").read_text()


@pytest.mark.slow
def test_a_stop_while_the_ranks_start_is_not_undone_by_a_restart(
    recipe: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """They end by the signal itself, which torchrun takes for a failure."""
    process = start(*qsr(recipe, "--restarts", "2"))
    wait_for("a rank", lambda: any("RANK" in variables_of(one) for one in psutil.Process(process.pid).children(True)))
    process.terminate()
    assert process.wait(LIMIT) == STOPPED, (recipe.parent / "output-0").read_text()
    assert records(recipe) == []


def test_a_stop_that_could_not_save_is_not_undone_by_a_restart(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The ranks of torchrun would begin again where the last checkpoint is, or at step 0."""

    def unsaved(*_: object, **__: object) -> None:
        raise UnsavedError("the run was asked to stop, and its checkpoint failed")

    monkeypatch.setattr("qsr_engine.training.loop.train", unsaved)
    environment = {**rank_environment(0, 1, 1), "QSR_ENGINE_LAUNCH": "x", "QSR_STOPPED_FILE": str(tmp_path / "stopped")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", str(recipe)]) == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert hopeless() == "the run was asked to stop, and its checkpoint failed"


def agent(recipe: Path, port: int, *, first: bool = False, address: str = "127.0.0.1") -> list[str]:
    """One of two to three hosts, here all of them this one; each has one rank. The first keeps the list of hosts.

    Ranks are in the order of the addresses.
    """
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2:3", "--nproc-per-node", "1"]
    words += ["--max-restarts", "5", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    words += ["--rdzv-conf", f"last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=6,is_host={int(first)}"]
    words += ["--local-addr", address]
    return [*words, "--module", "qsr_engine", "train", str(recipe), "--resume"]


@pytest.mark.slow
def test_a_lost_worker_is_done_without_and_another_is_taken_later(
    recipe: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    """3 workers; one is lost for good, at a random moment, with its host; then 2; a host joins, and there are 3 again.

    The lost one is rank 0, where the ranks meet: the agents must not go on to look for it there. torchrun tells the
    ranks of a host that joins by SIGTERM, so they save.
    """
    port, long = free_port(), ["--set", "qsr.total_steps=1000000"]
    addresses = ["127.0.0.3", "127.0.0.4", "127.0.0.2"]
    agents = [
        start(*agent(recipe, port, first=place == 0, address=address), *long) for place, address in enumerate(addresses)
    ]

    def ranks_now(*numbers: int) -> Callable[[], bool]:
        path = recipe.parent / "runs" / "run" / "workers.jsonl"
        return lambda: [len(record["loss"]) for record in whole_lines(path)][-1:] == list(numbers)

    wait_for("a boundary of three workers", ranks_now(3))  # whoever comes late starts the others again
    moment = random.randrange(20, 60)
    print(f"the host of rank 0 is lost when there are {moment} records")
    wait_for(f"step {moment}", lambda: len(records(recipe)) > moment)
    for process in (rank_process(agents[2], 0), psutil.Process(agents[2].pid)):
        process.send_signal(signal.SIGKILL)

    wait_for("a boundary of two workers", ranks_now(2))
    seen = {record["step"]: record["images_seen"] for record in records(recipe)}
    start(*agent(recipe, port, address="127.0.0.5"), *long)
    wait_for("a boundary of three workers", ranks_now(3))
    said = "".join((recipe.parent / f"output-{number}").read_text() for number in (0, 1, 3))
    assert re.search(r"the run goes on with 2 ranks instead of 3: a step has 24 samples \(24 before\)", said)
    assert "the run goes on with 3 ranks instead of 2" in said
    assert "Every worker's optimizer starts from the mean of the saved workers' states." in said
    assert all(images == 24 * step for step, images in seen.items())
    steps = [record["step"] for record in records(recipe)]
    assert steps == list(range(1, len(steps) + 1)), "every one once"


@pytest.mark.parametrize(
    ("policy", "more", "batches"),
    [
        ("keep", [], [(24, 8, 1), (24, 6, 2), (24, 6, 2)]),
        pytest.param(
            "per_rank",
            ["batch.train_micro_batch_size_per_gpu=8"],
            [(24, 8, 1), (16, 8, 1), (16, 8, 1)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_of_three_go_on_and_are_started_again(
    processes: Processes,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    policy: str,
    more: list[str],
    batches: list[tuple[int, int, int]],
) -> None:
    """The recipe tells the batch of 3 ranks; from the third start on it does not tell what the checkpoint had."""
    rounds = ["qsr.h_base=2", "qsr.total_steps=12", "logging.checkpoint_every=2"]
    sets = [f"batch.on_other_ranks={policy}", *rounds, *more]
    argv = ["train", str(recipe), "--resume", *[word for text in sets for word in ("--set", text)]]
    assert processes.run(interrupted_job, ranks=3, argv=argv, at_step=5) == [130] * 3
    if policy == "keep":
        assert main([*argv, "--ranks", "5"]) == 1, "before anything is started"
        assert "which 5 ranks cannot divide" in capsys.readouterr().err
    assert processes.run(interrupted_job, ranks=2, argv=argv, at_step=9) == [130] * 2
    found = [batch_of(recipe, step) for step in (4, 8)]
    for code, _, err in processes.run(qsr_job, ranks=2, argv=argv):
        assert code == 0, err
    assert [*found, batch_of(recipe, 10)] == batches
    expected = [sum(batches[0 if step < 4 else 1][0] for step in range(done)) for done in range(1, 13)]
    assert [record["images_seen"] for record in records(recipe)] == expected
    with read_run(recipe.parent / "runs" / "run").path.joinpath("summary.json").open() as file:
        assert json.load(file)["images_seen"] == expected[-1]


def batch_of(recipe: Path, step: int) -> tuple[int, int, int]:
    """Samples of a step over all ranks, of a micro-batch, and micro-batches, with which a checkpoint was saved."""
    _, manifest = find_alone(recipe.parent / "runs" / "run" / "checkpoints" / f"step-{step:08d}")
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    train, micro, accumulation = (int(manifest.config[name]) for name in names)
    return train, micro, accumulation


@pytest.mark.parametrize(
    ("policy", "micro", "ranks", "then", "expected"),
    [
        ("keep", None, 2, Batch(24, 8, 1), Batch(24, 6, 2)),  # 12 on every rank, and not more than 8 at a time
        ("keep", None, 2, Batch(24, 6, 2), Batch(24, 6, 2)),  # and the same when these 2 are started again
        ("keep", None, 6, Batch(24, 8, 1), Batch(24, 4, 1)),
        ("keep", None, 1, Batch(24, 8, 1), Batch(24, 8, 3)),
        ("keep", 8, 2, Batch(24, 6, 2), Batch(24, 6, 2)),
        ("keep", 8, 3, Batch(24, 6, 2), Batch(24, 8, 1)),  # back to as many as the recipe was written for
        ("per_rank", None, 2, Batch(24, 8, 1), Batch(16, 8, 1)),
        ("per_rank", None, 2, Batch(16, 8, 1), Batch(16, 8, 1)),
        ("per_rank", None, 5, Batch(16, 8, 1), Batch(40, 8, 1)),
        ("per_rank", 4, 3, Batch(16, 4, 2), Batch(24, 4, 2)),
        ("per_rank", 4, 2, Batch(24, 8, 1), Batch(16, 4, 2)),  # a smaller micro-batch was written meanwhile
    ],
)
def test_batch_sizes_of_other_ranks(
    recipe: Path, policy: str, micro: int | None, ranks: int, then: Batch, expected: Batch
) -> None:
    micro_batch = f"batch.train_micro_batch_size_per_gpu={'null' if micro is None else micro}"
    made = load_recipe(recipe, [f"batch.on_other_ranks={policy}", micro_batch])
    assert batch_on_other_ranks(made, ranks, then) == expected


@pytest.mark.parametrize(("more", "fitting"), [([], "3, 4, 6"), (["qsr.worker_size=3"], "3, 6, 12")])
def test_a_batch_that_cannot_be_divided(recipe: Path, more: list[str], fitting: str) -> None:
    with pytest.raises(ConfigError, match=rf"is 24, which 5 ranks cannot divide .* go on with {fitting} ranks"):
        batch_on_other_ranks(load_recipe(recipe, more), 5, Batch(24, 8, 1))
