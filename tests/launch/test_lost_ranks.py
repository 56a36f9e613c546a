"""Ranks that die, stop or hang: every other rank ends in time, and says which is missing, at which step and round.

The ranks are processes of their own, without a launcher, which would end all of them when it sees one die: so it is on
other hosts. They come from a fork server that has imported what they need, so that each starts in a moment.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qsr_engine.checkpoint.find import find_alone
from tests.support.pool import CONTEXT, free_port, rank_environment
from tests.support.recipes import recipe_of_three_workers

pytestmark = pytest.mark.launch

BATCH = 24  # samples of a step
SECONDS = 4.0  # qsr.faults.timeout_seconds: on a loaded machine a healthy process may stand still for one or two
BEAT_SECONDS = 0.1  # at most between beats, so that they keep up with steps of a few milliseconds
LIMIT = 150.0  # for a test's processes, starting them included; a rank that waits for ever is killed then


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    return recipe_of_three_workers(tmp_path, digits, SECONDS)


def never_ends() -> None:
    threading.Event().wait()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def leave() -> None:
    raise SystemExit(7)


def spoil(place: str, step: int, fault: Callable[[], None]) -> None:
    """Let the fault happen to this process at a place, where `step` steps have been taken."""
    from qsr_engine.averaging import Averager
    from qsr_engine.checkpoint.checkpointer import Checkpointer
    from qsr_engine.training import loop
    from qsr_engine.training.batches import Batches
    from qsr_engine.training.evaluation import Evaluation

    def before(owner: Any, name: str, taken: Callable[[Any], int]) -> None:
        original = getattr(owner, name)

        def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
            if taken(self) == step:
                fault()
            return original(self, *args, **kwargs)

        setattr(owner, name, spoiled)

    train: Any = loop
    evaluation: Any = Evaluation
    if place == "a local step":
        before(train._Run, "_step", lambda self: self.engine.local_steps.step)
    elif place == "the data":
        before(Batches, "next", lambda self: self.samples_seen // BATCH)
    elif place == "an averaging":
        before(Averager, "average", lambda self: self.step)
    elif place == "the final model":
        save, train.save_model = train.save_model, lambda *arguments: (fault(), save(*arguments))[1]  # type: ignore[func-returns-value]
    elif place == "a batch of an evaluation":
        original = evaluation._batches

        def slow(self: Any) -> Iterator[Any]:
            for batch in original(self):
                fault()
                yield batch

        evaluation._batches = slow
    elif place == "an evaluation":
        before(evaluation, "_batches", lambda self: self._engine.local_steps.step)
    else:
        assert place == "a checkpoint"
        before(Checkpointer, "write", lambda self: self._local_steps.step)


def rank_main(
    argv: list[str], environment: dict[str, str], agent: dict[str, str], log: str, fault: tuple[Any, ...] | None
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update({**environment, **agent, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    import torch

    from qsr_engine.membership import watchdog

    watchdog._LONGEST = BEAT_SECONDS
    torch.set_num_threads(1)
    if fault is not None:
        spoil(*fault)
    from qsr_engine.cli.main import main

    try:
        code = main(argv)
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
    raise SystemExit(code)


class Ranks:
    """The ranks of one run."""

    def __init__(self, recipe: Path, words: list[str], faults: dict[int, tuple[Any, ...]], ranks: int = 3) -> None:
        port = free_port()
        agent = {name: value for name, value in os.environ.items() if name.startswith("TORCHELASTIC_")}
        self.logs = [recipe.parent / f"rank-{rank}.log" for rank in range(ranks)]
        self.processes = [
            CONTEXT.Process(
                target=rank_main,
                args=(
                    ["train", str(recipe), *words],
                    rank_environment(rank, ranks, port),
                    agent,
                    str(log),
                    faults.get(rank),
                ),
            )
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def ended(self, rank: int, seconds: float = LIMIT) -> int:
        """Exit code, waited for."""
        self.processes[rank].join(seconds)
        code = self.processes[rank].exitcode
        assert code is not None, f"rank {rank} still runs:\n{self.said(rank)}"
        return code

    def said(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def clear(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def start(recipe: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def make(*words: str, **faults: tuple[Any, ...]) -> Ranks:
        started.append(Ranks(recipe, list(words), {int(name[-1]): fault for name, fault in faults.items()}))
        return started[-1]

    yield make
    for ranks in started:
        ranks.clear()


GONE = "no sign of life for"


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize(
    ("engine", "place", "step", "victim", "fault", "why"),
    [
        ("deepspeed", "a local step", 9, 2, kill, GONE),
        pytest.param("fsdp", "the data", 6, 1, never_ends, "no progress for", marks=pytest.mark.slow),
        pytest.param("fsdp", "the data", 6, 1, leave, "its process has ended", marks=pytest.mark.slow),
        pytest.param("fsdp", "an averaging", 8, 1, freeze, GONE, marks=pytest.mark.slow),
        pytest.param("fsdp", "an evaluation", 20, 1, freeze, GONE, marks=pytest.mark.slow),
    ],
)
def test_the_others_name_the_lost_rank(
    start: Callable[..., Ranks],
    recipe: Path,
    engine: str,
    place: str,
    step: int,
    victim: int,
    fault: Callable[[], None],
    why: str,
) -> None:
    ranks = start("--engine", engine, **{f"rank_{victim}": (place, step, fault)})
    for other in {0, 1, 2} - {victim}:
        assert ranks.ended(other) in (1, 2)
        said = ranks.said(other)
        assert f"rank {victim} is lost (qsr.faults.timeout_seconds):\n  rank {victim} on " in said, said
        assert f": {why}" in said, said
        heard = re.search(r"it was last heard of in round (\d+), after step (\d+)\n", said)
        assert heard is not None, said
        assert step // 4 - 2 <= int(heard[1]) <= step // 4, "steps are faster than beats here"
        assert int(heard[2]) <= step
        mine = re.search(rf"Rank {other} on \S+ was in round (\d+), after step (\d+)\.", said)
        assert mine is not None, said
        assert step <= int(mine[2]) <= step + 4, "nobody passes a boundary without the lost rank"
    _, manifest = find_alone(recipe.parent / "runs" / "run" / "checkpoints")
    assert manifest.step == (step - 1) // 4 * 4, "the last boundary before the fault"


def test_rank_0_that_holds_the_store(start: Callable[..., Ranks]) -> None:
    ranks = start("--engine", "fsdp", rank_0=("a local step", 9, kill))
    for other in (1, 2):
        assert ranks.ended(other) in (1, 2)
        assert "rank 0, or torchrun's agent that holds the store, has not answered for " in ranks.said(other)
        assert f"Rank {other} on " in ranks.said(other)
        assert "was in round 2, after step " in ranks.said(other)


@pytest.mark.slow
def test_rank_0_where_the_store_outlives_it(start: Callable[..., Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchrun's agent holds the store; here it is this process."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # there at run time

    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr("tests.launch.test_lost_ranks.free_port", lambda: agent.port)
    ranks = start("--engine", "fsdp", rank_0=("a local step", 9, freeze))
    for other in (1, 2):
        assert ranks.ended(other) in (1, 2)
        assert "rank 0 is lost (qsr.faults.timeout_seconds):\n  rank 0 on " in ranks.said(other)
        assert "no sign of life for" in ranks.said(other)
        assert re.search(r"it was last heard of in round [012], after step [0-9]\b", ranks.said(other))


def long_end() -> None:
    time.sleep(1.5 * SECONDS)  # this is the slowness, not a wait for something


@pytest.mark.slow
def test_who_has_finished_and_left_is_not_lost(start: Callable[..., Ranks]) -> None:
    """Rank 0 writes the final model for long; the others end meanwhile."""
    ranks = start("--engine", "fsdp", "--set", "qsr.total_steps=4", rank_0=("the final model", 4, long_end))
    assert [ranks.ended(rank) for rank in (1, 2, 0)] == [0, 0, 0], ranks.said(0)


def slow_batch() -> None:
    time.sleep(SECONDS / 8)  # as above, for each of 15 batches


@pytest.mark.slow
def test_a_long_evaluation_is_progress(start: Callable[..., Ranks]) -> None:
    ranks = start("--set", "qsr.total_steps=8", "--engine", "fsdp", rank_1=("a batch of an evaluation", 8, slow_batch))
    assert [ranks.ended(rank) for rank in range(3)] == [0, 0, 0], ranks.said(1)


CLEANS_UP = """
import time
from datetime import timedelta
from torch.distributed import TCPStore
from qsr_engine.membership import watchdog

watchdog._GRACE = 1.0
ours = watchdog.Watchdog(TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60)), 0, 2, 1.0)
ours.done(1, 0)
try:
    while True:
        ours.moved()
        time.sleep(0.01)
except watchdog.LostRankError as error:
    assert "rank 1 is lost" in str(error)
    time.sleep(2)
    print("cleaned up")
"""


def test_who_has_raised_the_verdict_may_clean_up() -> None:
    result = subprocess.run([sys.executable, "-c", CLEANS_UP], capture_output=True, text=True, timeout=LIMIT)
    assert (result.returncode, result.stdout) == (0, "cleaned up\n"), result.stderr


@pytest.mark.slow
def test_a_slow_worker_is_not_lost(start: Callable[..., Ranks]) -> None:
    """It comes to the boundary much later than the time limit, and gets on all the while."""
    words = ["--set", "qsr.h_base=10", "--set", "qsr.total_steps=10"]
    ranks = start(*words, "--engine", "fsdp", rank_1=("a local step", 0, slow_from_here))
    assert [ranks.ended(rank) for rank in range(3)] == [0, 0, 0], ranks.said(0)


def slow_from_here() -> None:
    """Ten steps of this worker take 2 SECONDS more: slowness itself, and not a wait for something."""
    from qsr_engine.training.batches import Batches

    batches: Any = Batches
    original = batches.next
    batches.next = lambda self: (time.sleep(SECONDS / 5), original(self))[1]  # type: ignore[func-returns-value]


# --------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("policy", "strategy", "number"),
    [
        ("save", "constant", signal.SIGTERM),
        pytest.param("finish_round", "constant", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("cut_round", "constant", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("save", "parallel", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    start: Callable[..., Ranks], recipe: Path, policy: str, strategy: str, number: signal.Signals
) -> None:
    """And the run goes on from there. Only rank 1 gets the signal; but for "finish_round" a round lasts minutes."""
    h_base, steps = (50, 100) if policy == "finish_round" else (99_999, 100_000)
    rounds = ["--set", f"qsr.strategy={strategy}", "--set", f"qsr.h_base={h_base}", "--set", f"qsr.total_steps={steps}"]
    words = [*rounds, "--set", f"qsr.faults.on_signal={policy}", "--set", "logging.checkpoint_every=1000000"]
    words += ["--engine", "fsdp", "--set", "qsr.faults.timeout_seconds=30"]
    send = {signal.SIGTERM: ask_by_sigterm, signal.SIGUSR1: ask_by_sigusr1}[number]
    ranks = start(*words, rank_1=("a local step", 5, send))
    assert [ranks.ended(rank) for rank in range(3)] == [75, 75, 75], ranks.said(0)
    folder = recipe.parent / "runs" / "run" / "checkpoints"
    _, manifest = find_alone(folder)
    assert f"has stopped after step {manifest.step} of {steps}" in ranks.said(0)
    assert manifest.step == 50 if policy == "finish_round" else 6 <= manifest.step < steps
    assert manifest.inside_round == (policy == "save" and strategy == "constant")
    again = start(*words, "--resume", rank_2=("a local step", manifest.step + 1, send))
    ended = [again.ended(rank) for rank in range(3)]
    if policy == "finish_round":
        assert ended == [0, 0, 0], "it was asked to stop in its last round"
    else:
        assert ended == [75, 75, 75], again.said(0)
        assert find_alone(folder)[1].step > manifest.step


def ask_by_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def ask_by_sigusr1() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


ENDINGS = """
import os, sys, time
from datetime import timedelta
from torch.distributed import TCPStore
from qsr_engine.membership import watchdog

watchdog._LONGEST, watchdog._RANKS_A_SECOND = 1e-4, 1e6
codes = []
for end in ["finished", "closed", "running"] * 3:
    child = os.fork()
    if not child:
        store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
        ours = watchdog.Watchdog(store, 0, 2, 60.0)
        ours.done(1, 0, finished=end == "finished")
        if end == "closed":
            ours.close()
        time.sleep(0.02)
        sys.exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(*codes)
"""


@pytest.mark.slow
def test_the_thread_that_talks_does_not_abort_the_end_of_the_process() -> None:
    """Such an end while a thread is in the store's C++ would be SIGABRT; here a beat is always under way."""
    result = subprocess.run([sys.executable, "-c", ENDINGS], capture_output=True, text=True, timeout=LIMIT)
    assert result.stdout.split() == ["0"] * 9, result.stderr
