"""Checkpoints of the engine: exact resume, whole or not there, other numbers of workers, the exported model."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support import training
from tests.support.combinations import NO_COMPILER, Combination, start, take_step, whole_masters, whole_parameters
from tests.support.pool import JobError, Processes
from tests.support.training import QSR

PLAIN = Combination(0, "fp32", "AdamW")


def finish(engine: Any, combination: Combination, folder: str = "", save_at: list[int] | None = None) -> dict[str, Any]:
    """Train to the end, saving on the boundaries save_at; what the run leaves behind."""
    while not engine.local_steps.finished:
        if take_step(engine, combination) and engine.local_steps.step in (save_at or []):
            engine.save_checkpoint(folder)
    counts = {key: value for key, value in engine.local_steps.state_dict().items() if key != "seconds_averaging"}
    return {"parameters": whole_parameters(engine), "masters": whole_masters(engine), "counts": counts}


def train_job(
    combination: Combination,
    folder: str,
    qsr: dict[str, Any],
    save_at: list[int],
    load: bool = False,
    tag: str | None = None,
    **config: Any,
) -> dict[str, Any]:
    engine = start(combination, qsr, **config)
    if load:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.load_checkpoint(folder, tag=tag)
        assert engine.global_steps == engine.local_steps.step > 0
    return finish(engine, combination, folder, save_at)


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return all(
        torch.equal(a["parameters"], b["parameters"])
        and torch.equal(a["masters"], b["masters"])
        and a["counts"] == b["counts"]
        for a, b in zip(one, other, strict=True)
    )


# ------------------------------------------------------------------------------------------- exact resume

RESUMED = [
    *(Combination(stage, precision, "AdamW") for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16")),
    PLAIN,
    Combination(0, "bf16", "SGD"),
    Combination(1, "bf16, fp32 accumulation", "AdamW"),
    Combination(0, "bf16", "FusedAdam"),
    *(Combination(stage, "bf16", "offloaded CPUAdam") for stage in (1, 2, 3)),
]
COMPILED = [pytest.mark.slow, pytest.mark.compiled]


@pytest.mark.parametrize("worker_size", [1, 2])
@pytest.mark.parametrize(
    "combination", [pytest.param(c, marks=COMPILED if c.compiled else [], id=str(c)) for c in RESUMED]
)
def test_a_resumed_run_gives_the_same_bits(
    processes: Processes, tmp_path: Path, combination: Combination, worker_size: int
) -> None:
    if combination.compiled and NO_COMPILER:
        pytest.skip("DeepSpeed compiles this optimizer, and there is no C++ compiler here")
    common: dict[str, Any] = {
        "combination": combination,
        "folder": str(tmp_path),
        "qsr": {**QSR, "worker_size": worker_size},
        "ranks": 2 * worker_size,
        "seconds": 400,
    }
    whole = processes.run(train_job, save_at=[4, 6], **common)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step4", "global_step6", "latest"]
    resumed = processes.run(train_job, save_at=[], load=True, **common)
    assert resumed[0]["counts"]["averagings"] == 5
    assert same(whole, resumed)


@pytest.mark.parametrize("strategy", ["post_local", "parallel"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_other_strategies_resume_too(processes: Processes, tmp_path: Path, strategy: str, stage: int) -> None:
    """post_local is saved in its parallel phase and changes to local steps after the resume."""
    switch = {"switch_step": 6} if strategy == "post_local" else {}
    qsr = {"strategy": strategy, "h_base": 3, "total_steps": 12, "lr": QSR["lr"], "worker_size": 2, **switch}
    common: dict[str, Any] = {"combination": Combination(stage, "fp32", "AdamW"), "folder": str(tmp_path), "qsr": qsr}
    whole = processes.run(train_job, ranks=4, save_at=[4], **common)
    assert same(whole, processes.run(train_job, ranks=4, save_at=[], load=True, **common))


def random_job(folder: str, load: bool) -> list[Any]:
    """What the generators give after a checkpoint, and what the caller gave to it."""
    import torch.distributed as dist

    engine = start(PLAIN, QSR)
    if load:
        _, client = engine.load_checkpoint(folder)
    else:
        for generator in (torch.manual_seed, random.seed, np.random.seed):
            generator(dist.get_rank() + 5)
        take_step(engine, PLAIN)
        take_step(engine, PLAIN)
        client = {"position": [3, 10 + dist.get_rank()], "loader": {"seen": torch.arange(2)}}
        engine.save_checkpoint(folder, client_state=client)
    client["loader"]["seen"] = client["loader"]["seen"].tolist()
    return [client, torch.rand(3).tolist(), random.random(), np.random.rand()]


def test_random_states_and_the_position_in_the_data_come_back(processes: Processes, tmp_path: Path) -> None:
    saved = processes.run(random_job, folder=str(tmp_path), load=False)
    assert saved[0] != saved[1], "every rank has its own"
    assert processes.run(random_job, folder=str(tmp_path), load=True) == saved


def scheduler_job(folder: str, load: bool) -> list[float]:
    """Without an lr block, DeepSpeed's own scheduler goes on where it was."""
    qsr = {**{key: value for key, value in QSR.items() if key != "lr"}, "warmup_steps": 4, "alpha": 0.12}
    params = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.04, "warmup_num_steps": 9, "warmup_type": "linear"}
    engine = start(PLAIN, qsr, scheduler={"type": "WarmupLR", "params": params})
    if load:
        engine.load_checkpoint(folder)
    seen: list[float] = []
    while not engine.local_steps.finished:
        if take_step(engine, PLAIN) and not load and engine.local_steps.step == 4:
            engine.save_checkpoint(folder)
            seen.clear()
        seen.append(engine.get_lr()[0])
    return seen[1:] if not load else seen


def test_a_scheduler_goes_on_where_it_was(processes: Processes, tmp_path: Path) -> None:
    saved = processes.run(scheduler_job, folder=str(tmp_path), load=False)
    assert processes.run(scheduler_job, folder=str(tmp_path), load=True) == saved


def shorter_job(folder: str) -> tuple[list[int], torch.Tensor]:
    """Go on from step 4 of 12 in a run of 9 steps with longer rounds."""
    engine = start(PLAIN, {**QSR, "strategy": "constant", "h_base": 4, "alpha": None, "total_steps": 9})
    engine.load_checkpoint(folder)
    ends = []
    while not engine.local_steps.finished:
        if take_step(engine, PLAIN):
            ends.append(engine.local_steps.step)
    return ends, whole_parameters(engine)


def test_a_shorter_run_that_goes_on_still_ends_on_a_boundary(processes: Processes, tmp_path: Path) -> None:
    processes.run(train_job, combination=PLAIN, folder=str(tmp_path), qsr=QSR, save_at=[4])
    (ends, first), (_, second) = processes.run(shorter_job, folder=str(tmp_path))
    assert ends == [8, 9]
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------ processes that die


@pytest.fixture
def own_processes() -> Iterator[Processes]:
    pool = Processes()
    yield pool
    pool.stop()


def dying_job(folder: str, qsr: dict[str, Any], combination: Combination) -> None:
    """Save on every boundary; rank 1 is killed in the middle of a round."""
    import torch.distributed as dist

    engine = start(combination, qsr)
    while not engine.local_steps.finished:
        if take_step(engine, combination):
            engine.save_checkpoint(folder)
        elif engine.local_steps.step == 9 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_killed_in_a_round_and_resumed_in_new_processes(own_processes: Processes, tmp_path: Path) -> None:
    """It goes on from the last boundary's checkpoint, and gives what an uninterrupted run gives."""
    combination = Combination(1, "bf16", "AdamW")
    common: dict[str, Any] = {"combination": combination, "folder": str(tmp_path / "run"), "qsr": QSR}
    with pytest.raises((JobError, EOFError)):
        own_processes.run(dying_job, **common)
    own_processes.stop()
    assert (tmp_path / "run" / "latest").read_text() == "global_step8"
    resumed = own_processes.run(train_job, save_at=[], load=True, **common)
    whole = own_processes.run(train_job, save_at=[], **{**common, "folder": str(tmp_path / "whole")})
    assert same(whole, resumed)


def failing_job(folder: str, where: str) -> str:
    """Save at step 2; at step 4 rank 1 cannot write, or one is killed in between and leaves its temporary folder."""
    import torch.distributed as dist

    engine = start(PLAIN, QSR)
    while engine.local_steps.step < 2:
        take_step(engine, PLAIN)
    engine.save_checkpoint(folder)
    while engine.local_steps.step < 4:
        take_step(engine, PLAIN)
    original = torch.save

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        if where == "deepspeed":
            engine.checkpoint_engine.save = full
        else:
            torch.save = full
    try:
        engine.save_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.save = original
        engine.checkpoint_engine.__dict__.pop("save", None)
        engine.save_checkpoint(folder, tag="later")
    return "it was saved"


def limited_job(folder: str, combination: Combination) -> str:
    """Rank 0 cannot write files of more than 5,000 bytes, as on a full disk, whoever writes them."""
    import resource

    import torch.distributed as dist

    engine = start(combination, QSR)
    while engine.local_steps.step < 2:
        take_step(engine, combination)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        engine.save_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    return "it was saved"


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_full_disk_is_an_error_on_every_rank(processes: Processes, tmp_path: Path, stage: int) -> None:
    """DeepSpeed copies a script beside its files, and ends in a barrier; neither may leave a rank waiting."""
    for said in processes.run(
        limited_job, seconds=60, folder=str(tmp_path), combination=Combination(stage, "fp32", "SGD")
    ):
        assert said.startswith(f"CheckpointError: writing the checkpoint {tmp_path}/global_step2 failed")
        assert "rank 0: " in said
    assert not any(tmp_path.iterdir())


def test_the_old_checkpoint_is_whole_until_the_new_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies between the two renames of a tag that is used again."""
    from qsr_engine.checkpoint import write as checkpoint

    for name in ("last", ".last.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    rename, calls = Path.rename, []

    def dies(path: Path, target: Path) -> Path:
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint._put_in_place(tmp_path / ".last.tmp", tmp_path / "last")
    assert (tmp_path / ".last.old" / "content").read_text() == "last"
    monkeypatch.undo()
    checkpoint._put_in_place(tmp_path / ".last.tmp", tmp_path / "last")
    assert (tmp_path / "last" / "content").read_text() == ".last.tmp"


@pytest.mark.parametrize("where", ["deepspeed", "own"])
def test_an_error_of_one_rank_is_an_error_of_all_and_harms_nothing(
    processes: Processes, tmp_path: Path, where: str
) -> None:
    """The write's failure is a stub: a full disk cannot be made here without other rights."""
    (tmp_path / ".later.tmp" / "worker-00000").mkdir(parents=True)
    (tmp_path / ".later.tmp" / "left over").touch()
    (tmp_path / ".dead.tmp" / "worker-00001").mkdir(parents=True)
    (tmp_path / ".somebody_elses.tmp").mkdir()
    for said in processes.run(failing_job, folder=str(tmp_path), where=where):
        assert said.startswith(f"CheckpointError: writing the checkpoint {tmp_path}/global_step4 failed")
        assert "rank 1: " in said
        assert "No space left on device" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".somebody_elses.tmp",
        "global_step2",
        "later",
        "latest",
    ]
    assert not (tmp_path / "later" / "left over").exists()


def refused_job(folder: str) -> list[str]:
    engine = start(PLAIN, {**QSR, "h_base": 4})
    take_step(engine, PLAIN)
    messages = []

    def attempt(action: Any) -> None:
        try:
            action()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")

    attempt(partial(engine.save_checkpoint, folder))
    attempt(partial(engine.load_checkpoint, folder))
    attempt(partial(engine.load_checkpoint, folder, tag="nope"))
    for _ in range(3):
        take_step(engine, PLAIN)
    attempt(partial(engine.save_checkpoint, folder, tag="../up"))
    attempt(partial(engine.save_checkpoint, folder, client_state={"object": nn.ReLU()}))
    attempt(partial(engine.save_checkpoint, folder, tag="latest"))
    attempt(partial(engine.save_checkpoint, folder, tag=f"rank{os.environ['RANK']}"))
    attempt(partial(engine.save_checkpoint, folder, client_state=[1]))
    attempt(partial(engine.load_checkpoint, folder, load_module_only=True))
    take_step(engine, PLAIN)
    attempt(partial(engine.save_16bit_model, folder))
    attempt(engine.averaged_state_dict)
    return messages


def test_what_is_refused(processes: Processes, tmp_path: Path) -> None:
    for messages in processes.run(refused_job, folder=str(tmp_path)):
        assert messages[0].startswith("RuntimeError: step 1 is inside a round of 4 steps")
        assert "there is no checkpoint here that qsr_engine wrote" in messages[1]
        assert "there is no checkpoint with the tag 'nope' here" in messages[2]
        assert "the tag is '../up'" in messages[3]
        assert "objects that cannot be loaded again without running code, under ['object']" in messages[4]
        assert "the tag is 'latest'" in messages[5]
        assert "the ranks save under different tags, ['rank0', 'rank1']" in messages[6]
        assert "client_state is a list; give a dict" in messages[7]
        assert "load_module_only begins a run with the parameters of another, and this one is at step 4" in messages[8]
        assert messages[9].startswith("RuntimeError: step 5 is inside a round of 4 steps")
        assert messages[10].startswith("RuntimeError: step 5 is inside a round of 4 steps")
    assert not any(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- another configuration


def other_job(
    folder: str,
    qsr: dict[str, Any],
    stage: int = 0,
    order: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    load: dict[str, Any] | None = None,
    stop_at: int = 10**9,
    accumulation: int = 1,
) -> dict[str, Any]:
    """Train with the parameters in an order of the optimizer, saving at the end; or load, and train on."""
    import logging

    import qsr_engine

    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Handler()
    logging.getLogger("qsr_engine").addHandler(handler)
    model = training.make_model(torch.float32)
    parameters = list(model.parameters())
    engine = qsr_engine.initialize(
        model=model,
        optimizer=lambda _: training.make_optimizer("adamw", [parameters[number] for number in order]),
        config={
            **Combination(stage, "fp32", "AdamW").config(),
            "qsr": qsr,
            "gradient_accumulation_steps": accumulation,
        },
    )[0]
    if load is not None:
        engine.load_checkpoint(folder, **load)
    found = {
        "state": len(engine.optimizer.state) if stage == 0 else -1,
        "loaded": engine.averaged_state_dict(),
        "began": engine.local_steps.step,
        "micro_steps": engine.micro_steps,
    }
    ends = []
    while not engine.local_steps.finished and engine.local_steps.step < stop_at:
        if take_step(engine, PLAIN):
            ends.append(engine.local_steps.step)
    if load is None:
        engine.save_checkpoint(folder)
    logging.getLogger("qsr_engine").removeHandler(handler)
    return {**found, "ends": ends, "said": said, "parameters": whole_parameters(engine)}


def test_a_finished_run_goes_on_where_this_one_is_longer(processes: Processes, tmp_path: Path) -> None:
    """It used to stay in the round that had ended, never to average again."""
    qsr = {"strategy": "constant", "h_base": 4, "total_steps": 8, "lr": {"schedule": "constant", "peak": 0.01}}
    processes.run(other_job, folder=str(tmp_path), qsr=qsr)
    results = processes.run(other_job, folder=str(tmp_path), qsr={**qsr, "total_steps": 15}, load={})
    assert results[0]["ends"] == [12, 15]
    assert torch.equal(results[0]["parameters"], results[1]["parameters"])
    assert any("another configuration: qsr.total_steps was 8 and is 15" in said for said in results[0]["said"])
    assert not any("another configuration" in said for said in results[1]["said"]), "rank 0 says it"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_in_another_order_are_refused(processes: Processes, tmp_path: Path, stage: int) -> None:
    """DeepSpeed would give them one another's values; by name they are right, with a fresh optimizer."""
    job: dict[str, Any] = {"folder": str(tmp_path), "stage": stage, "stop_at": 4}
    order = (2, 3, 0, 1, 4, 5)
    processes.run(other_job, qsr=QSR, **job)
    with pytest.raises(JobError, match=r"order was .* and is .*on_other_workers 'fresh'"):
        processes.run(other_job, qsr=QSR, order=order, load={}, **job)
    fresh = processes.run(other_job, qsr={**QSR, "on_other_workers": "fresh"}, order=order, load={}, **job)
    saved = load_file(tmp_path / "global_step4" / "model.safetensors")
    assert all(torch.equal(fresh[0]["loaded"][name], value) for name, value in saved.items())


def test_without_the_optimizer_states_for_other_workers_too(processes: Processes, tmp_path: Path) -> None:
    processes.run(other_job, folder=str(tmp_path), qsr=QSR, stop_at=4)
    job: dict[str, Any] = {"folder": str(tmp_path), "qsr": QSR, "stop_at": 4, "ranks": 1}
    with_state = processes.run(other_job, load={}, **job)[0]
    without = processes.run(other_job, load={"load_optimizer_states": False}, **job)[0]
    assert (with_state["state"], without["state"]) == (6, 0)
    assert without["began"] == 4


def test_another_accumulation_starts_with_a_whole_step(processes: Processes, tmp_path: Path) -> None:
    """DeepSpeed goes on counting the micro-batches of the other one, and the first step would be cut short."""
    processes.run(other_job, folder=str(tmp_path), qsr={**QSR, "total_steps": 5})
    qsr = {**QSR, "total_steps": 8}
    result = processes.run(other_job, folder=str(tmp_path), qsr=qsr, load={}, accumulation=2, stop_at=5)[0]
    assert (result["began"], result["micro_steps"]) == (5, 10)


# ---------------------------------------------------------------------------------- torn, altered and foreign


@pytest.fixture(scope="module")
def saved(processes: Processes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoints of the steps 2, 4 and 6; tests copy them."""
    folder = tmp_path_factory.mktemp("saved")
    processes.run(train_job, combination=PLAIN, folder=str(folder), qsr=QSR, save_at=[2, 4, 6])
    return folder


def load_job(folder: str, tag: str | None = None, hidden: int = 17) -> tuple[str, list[str]]:
    """Load; (the folder that was loaded or the error, the warnings)."""
    import qsr_engine

    model = training.make_model(torch.float32)
    if hidden != 17:
        model = nn.Sequential(nn.Linear(training.FEATURES, hidden), nn.Linear(hidden, training.OUTPUTS))
    config = {"train_micro_batch_size_per_gpu": training.BATCH, "qsr": QSR, "gradient_clipping": 0.0}
    optimizer = partial(training.make_optimizer, "adamw")
    engine = qsr_engine.initialize(model=model, optimizer=optimizer, config=config)[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            path, _ = engine.load_checkpoint(folder, tag=tag)
            result = Path(str(path)).name
        except qsr_engine.checkpoint.CheckpointError as error:
            result = str(error)
    return result, [str(warning.message) for warning in said]


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def a_file(folder: Path, name: str) -> Path:
    return next(folder.rglob(name))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: truncate(a_file(f, "mp_rank_00_model_states.pt")), "bytes were written|torn"),
    "one bit": (lambda f: flip(a_file(f, "mp_rank_00_model_states.pt")), "was altered after it was written"),
    "one bit of a rank": (lambda f: flip(a_file(f, "rank-00001.pt")), "was altered after it was written"),
    "a file is gone": (lambda f: a_file(f, "model.safetensors").unlink(), "model.safetensors is missing"),
    "a worker is gone": (lambda f: shutil.rmtree(f / "worker-00001"), "is missing"),
    "the manifest is gone": (lambda f: (f / "manifest.json").unlink(), "there is no manifest.json"),
    "the manifest is torn": (lambda f: truncate(f / "manifest.json"), "cannot be read, so the checkpoint is torn"),
    "the manifest is altered": (
        lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text().replace('"step": 6', '"step": 7')),
        "it was altered after it was written",
    ),
    "another format": (lambda f: (f / "manifest.json").write_text(json.dumps({"format": 99})), "the format is 99"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    processes: Processes, saved: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    act, words = DAMAGE[damage]
    act(folder / "global_step6")
    for rank, (loaded, said) in enumerate(processes.run(load_job, folder=str(folder))):
        assert loaded == "global_step4"
        assert any("global_step6" in text and "Loading" in text for text in said) == (rank == 0)
    for error, _ in processes.run(load_job, folder=str(folder), tag="global_step6"):
        assert any(part in error for part in words.split("|"))
        assert "load it with tag='global_step4'" in error


def test_copies_of_one_checkpoint_are_the_same_choice_on_every_rank(
    processes: Processes, saved: Path, tmp_path: Path
) -> None:
    """They were saved at the same moment."""
    for name in "abcdefgh":
        shutil.copytree(saved / "global_step6", tmp_path / name)
    assert [loaded for loaded, _ in processes.run(load_job, folder=str(tmp_path))] == ["h", "h"]


def test_another_models_checkpoint_is_refused(processes: Processes, saved: Path) -> None:
    for error, _ in processes.run(load_job, folder=str(saved), hidden=5):
        assert "it is the checkpoint of another model" in error


def test_a_checkpoint_of_deepspeed_itself_is_refused(processes: Processes, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "global_step6" / "worker-00000", tmp_path / "plain")
    for error, _ in processes.run(load_job, folder=str(tmp_path / "plain")):
        assert "there is no checkpoint here that qsr_engine wrote" in error


def test_a_save_that_died_between_two_renames_is_found(processes: Processes, saved: Path, tmp_path: Path) -> None:
    """Overwriting a tag moves the old folder aside; if the process dies then, the old one is still whole."""
    shutil.copytree(saved / "global_step6", tmp_path / ".global_step6.old")
    for tag in (None, "global_step6"):
        assert processes.run(load_job, folder=str(tmp_path), tag=tag)[0][0] == ".global_step6.old"


def apart_job(folder: str, load: bool) -> dict[str, Any]:
    """Every rank has a directory of its own, as on hosts that share none."""
    mine = f"{folder}/host-{os.environ['RANK']}"
    qsr = {**QSR, "worker_size": 1}
    return train_job(PLAIN, mine, qsr, [] if load else [4], load)


def test_hosts_without_a_shared_file_system(processes: Processes, tmp_path: Path) -> None:
    whole = processes.run(apart_job, folder=str(tmp_path), load=False)
    manifests = [json.loads((tmp_path / f"host-{r}/global_step4/manifest.json").read_text()) for r in (0, 1)]
    assert [manifest["ranks"] for manifest in manifests] == [[0], [1]]
    assert same(whole, processes.run(apart_job, folder=str(tmp_path), load=True))
    shutil.rmtree(tmp_path / "host-1" / "global_step4")
    with pytest.raises(JobError, match="it is not on every host"):
        processes.run(apart_job, folder=str(tmp_path), load=True)


# ---------------------------------------------------------------- frozen and tied parameters, batch norm


class Mixed(nn.Module):
    """Tied weights, a frozen parameter, one that is not used, one that the optimizer does not have, batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(training.FEATURES, training.OUTPUTS)
        self.decoder = nn.Linear(training.FEATURES, training.OUTPUTS)
        self.decoder.weight = self.encoder.weight
        self.norm = nn.BatchNorm1d(training.OUTPUTS)
        self.frozen = nn.Parameter(torch.full((training.OUTPUTS,), 0.1), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(5))
        self.left_out = nn.Parameter(torch.ones(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.norm(self.encoder(inputs)) + self.decoder(inputs)
        return outputs * self.frozen


def mixed_job(
    folder: str, qsr: dict[str, Any], stage: int, load: dict[str, Any] | None, frozen: bool
) -> dict[str, Any]:
    import torch.distributed as dist

    import qsr_engine

    torch.manual_seed(5 if load is None else 6)
    model = Mixed()
    if load is not None:
        model.frozen.data.zero_()
    parameters = [p for name, p in model.named_parameters() if name != "left_out"]
    config = {**Combination(stage, "fp32", "SGD").config(), "qsr": qsr}
    optimizer = training.make_optimizer("sgd", parameters)
    engine = qsr_engine.initialize(model=model, optimizer=optimizer, config=config)[0]
    if load is not None:
        engine.load_checkpoint(folder, **load)
        loaded = engine.averaged_state_dict()
    while not engine.local_steps.finished:
        take_step(engine, Combination(stage, "fp32", "SGD"))
        if load is None and engine.local_steps.step == 4:
            engine.save_checkpoint(folder, exclude_frozen_parameters=not frozen)
            loaded = engine.averaged_state_dict()
    own = [buffer.clone() for buffer in engine.module.buffers()]
    gathered = [torch.zeros_like(own[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own[0])
    return {
        "loaded": loaded,
        "end": engine.averaged_state_dict(),
        "buffers": own,
        "mean": torch.stack(gathered).mean(0),
    }


@pytest.mark.parametrize("frozen", [True, False], ids=["", "without frozen"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_tied_unused_parameters_and_batch_norm(
    processes: Processes, tmp_path: Path, stage: int, frozen: bool
) -> None:
    job: dict[str, Any] = {"folder": str(tmp_path), "qsr": QSR, "stage": stage, "frozen": frozen}
    whole = processes.run(mixed_job, load=None, **job)
    exported = load_file(tmp_path / "global_step4" / "model.safetensors")
    assert set(exported) == set(Mixed().state_dict())
    assert all(torch.equal(exported[name], value) for name, value in whole[0]["loaded"].items())
    resumed = processes.run(mixed_job, load={}, **job)
    for one, other in zip(whole, resumed, strict=True):
        for part in ("loaded", "end"):
            assert one[part].keys() == other[part].keys()
            assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())
        assert all(torch.equal(a, b) for a, b in zip(one["buffers"], other["buffers"], strict=True))


@pytest.mark.parametrize(
    "load", [{"load_optimizer_states": False}, {"load_module_only": True}], ids=lambda x: next(iter(x))
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_parameters_alone(processes: Processes, tmp_path: Path, stage: int, load: dict[str, Any]) -> None:
    """The masters are those of the checkpoint, whatever the stage, with frozen parameters and all."""
    job: dict[str, Any] = {"folder": str(tmp_path), "qsr": QSR, "frozen": True}
    saved = processes.run(mixed_job, load=None, stage=1, **job)[0]["loaded"]
    with_fresh = {**job, "qsr": {**QSR, "on_other_workers": "fresh"}}
    loaded = processes.run(mixed_job, load=load, stage=stage, **with_fresh)[0]["loaded"]
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())


@pytest.mark.parametrize("strategy", ["parallel", "post_local"])
def test_batch_norm_in_parallel_phases(processes: Processes, tmp_path: Path, strategy: str) -> None:
    """Every rank has statistics of its own there: they come back, and the saved model has their mean."""
    switch = {"switch_step": 12} if strategy == "post_local" else {}
    qsr = {"strategy": strategy, "total_steps": 12, "lr": QSR["lr"], **switch}
    job: dict[str, Any] = {"folder": str(tmp_path), "qsr": qsr, "stage": 0, "frozen": True}
    whole = processes.run(mixed_job, load=None, **job)
    resumed = processes.run(mixed_job, load={}, **job)
    assert not torch.equal(whole[0]["buffers"][0], whole[1]["buffers"][0])
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one["buffers"], other["buffers"], strict=True))
    torch.testing.assert_close(whole[0]["end"]["norm.running_mean"], whole[0]["mean"])


# ------------------------------------------------------------------------------- another number of workers


def states_job(combination: Combination, folder: str, qsr: dict[str, Any], load: bool) -> dict[str, Any]:
    """Parameters and optimizer state after four steps, saved there, or as they are loaded."""
    engine = start(combination, qsr)
    if load:
        engine.load_checkpoint(folder)
    else:
        while engine.local_steps.step < 4:
            take_step(engine, combination)
        engine.save_checkpoint(folder)
    masters = engine._driver.replica
    state = {name: [t.clone() for t in masters.state(name) if t is not None] for name in ("exp_avg", "exp_avg_sq")}
    found = {"masters": whole_masters(engine), "state": state, "step": engine.local_steps.step}
    return {**found, "end": finish(engine, combination)["masters"] if load else None}


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_another_number_of_workers_starts_from_the_mean_of_the_states(
    processes: Processes, tmp_path: Path, stage: int, before: int, after: int
) -> None:
    combination = Combination(stage, "bf16" if stage else "fp32", "AdamW")
    job: dict[str, Any] = {"combination": combination, "folder": str(tmp_path), "qsr": QSR}
    then = processes.run(states_job, ranks=before, load=False, **job)
    now = processes.run(states_job, ranks=after, load=True, **job)
    for name in ("exp_avg", "exp_avg_sq"):
        for place, loaded in enumerate(now[0]["state"][name]):
            values = torch.stack([rank["state"][name][place].double() for rank in then])
            assert (values[0] - values[1]).abs().max() > 0, "the workers' states were meant to differ"
            for rank in now:
                assert torch.equal(rank["state"][name][place], loaded)
            assert torch.equal(loaded, values.sum(0).div(before).float())
    for rank in now:
        assert rank["step"] == 4
        assert torch.equal(rank["masters"], then[0]["masters"])
        assert torch.equal(rank["end"], now[0]["end"])
        assert not torch.equal(rank["end"], rank["masters"])


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp16"), (3, "bf16")])
def test_parameters_alone_go_to_workers_of_another_size_and_stage(
    processes: Processes, tmp_path: Path, stage: int, precision: str
) -> None:
    """From two workers of one rank at stage 1 to two workers of two at another stage."""
    job: dict[str, Any] = {"folder": str(tmp_path), "load": False, "qsr": QSR}
    then = processes.run(states_job, combination=Combination(1, "fp32", "AdamW"), **job)
    qsr = {**QSR, "worker_size": 2}
    job = {"combination": Combination(stage, precision, "AdamW"), "folder": str(tmp_path), "load": True}
    with pytest.raises(JobError, match=r"write qsr\.on_other_workers 'fresh'"):
        processes.run(states_job, ranks=4, qsr=qsr, **job)
    now = processes.run(states_job, ranks=4, qsr={**qsr, "on_other_workers": "fresh"}, **job)
    for rank in now:
        assert rank["step"] == 4
        assert torch.equal(rank["masters"], then[0]["masters"])
        assert all(not state.any() for name in rank["state"] for state in rank["state"][name])
        assert torch.equal(rank["end"], now[0]["end"])


# ------------------------------------------------------------------------------------------- the model alone


@pytest.mark.parametrize("combination", RESUMED[:4] + RESUMED[9:12], ids=lambda c: f"{c.stage}-{c.precision}")
def test_the_averaged_model_is_exported(processes: Processes, tmp_path: Path, combination: Combination) -> None:
    from qsr_engine.checkpoint.model_file import export

    qsr = {**QSR, "worker_size": 2}
    results = processes.run(train_job, ranks=4, combination=combination, folder=str(tmp_path), qsr=qsr, save_at=[12])
    out = tmp_path / "out.safetensors"
    assert export(tmp_path, out).step == 12
    exported = load_file(out)
    model = training.make_model(torch.float32)
    model.load_state_dict(exported)
    assert torch.equal(training.flat(model.parameters()), results[0]["masters"])


def test_an_altered_model_is_not_exported(saved: Path, tmp_path: Path) -> None:
    from qsr_engine.checkpoint.manifest import CheckpointError
    from qsr_engine.checkpoint.model_file import export

    shutil.copytree(saved, tmp_path / "run")
    flip(tmp_path / "run" / "global_step6" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors was altered"):
        export(tmp_path / "run", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    export(tmp_path / "run" / "global_step4", tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="cannot write there"):
        export(tmp_path / "run" / "global_step4", tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(CheckpointError, match="no whole checkpoint here"):
        export(tmp_path, tmp_path / "out.safetensors")
