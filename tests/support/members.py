"""Workers that come and go: real processes, each a job of its own, with torchft's lighthouse, which tests kill.

What a member does is written as lines of JSON, one file a rank, which the test reads while it runs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from qsr_engine.local_steps.member import Loop
from tests.support.pool import CONTEXT, free_port, rank_environment

SECONDS = 40.0  # that a test waits for anything


class Cluster:
    """A lighthouse and the workers of one run.

    Args:
        folder: of what members say.
        timeout: of the lighthouse, in seconds.
        expected: workers for which all wait before their first step.
        grace: of the lighthouse, in seconds.
    """

    def __init__(self, folder: Path, timeout: float, expected: int, grace: float | None) -> None:
        self.folder, self.timeout, self.expected, self.port = folder, timeout, expected, free_port()
        self.grace = grace
        self._lighthouse: Any = None
        self._ranks: dict[str, list[Any]] = {}
        self.light()

    def light(self) -> None:
        """Start the lighthouse, again at its old address."""
        self._lighthouse = CONTEXT.Process(target=_lighthouse, args=(self.port, self.timeout, self.grace), daemon=True)
        self._lighthouse.start()

    def darken(self) -> None:
        """Kill the lighthouse."""
        self._lighthouse.kill()
        self._lighthouse.join()

    def start(self, name: str, worker_size: int = 1, **given: Any) -> None:
        """Start a worker; `given` is what train() takes."""
        port = free_port()
        self._ranks[name] = []
        for rank in range(worker_size):
            environment = {
                **rank_environment(rank, worker_size, port),
                "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{self.port}",
                "QSR_WORKER": name,
                "QSR_EXPECTED_WORKERS": str(self.expected),
            }
            file = self.folder / f"{name}.{rank}.jsonl"
            process = CONTEXT.Process(target=_member, args=(environment, str(file), given), daemon=True)
            process.start()
            self._ranks[name].append(process)

    def send(self, name: str, sign: signal.Signals) -> None:
        for process in self._ranks[name]:
            os.kill(process.pid, sign)

    def kill(self, name: str) -> None:
        self.send(name, signal.SIGKILL)
        for process in self._ranks[name]:
            process.join()

    def ended(self, *names: str) -> list[int | None]:
        """Exit codes of the ranks of these workers, when all have ended."""
        deadline = time.monotonic() + SECONDS
        processes = [process for name in names for process in self._ranks[name]]
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]

    def say(self, name: str, what: str, step: int) -> None:
        """Say something that a worker waits for, as if another one of that name had said it."""
        with (self.folder / f"{name}.0.jsonl").open("a") as file:
            file.write(json.dumps({"what": what, "step": step}) + "\n")

    def said(self, name: str, rank: int = 0) -> list[dict[str, Any]]:
        return _lines(self.folder / f"{name}.{rank}.jsonl")

    def boundaries(self, name: str, rank: int = 0) -> dict[int, dict[str, Any]]:
        """What a worker said at boundaries, by the step."""
        return {line["step"]: line for line in self.said(name, rank) if line["what"] == "boundary"}

    def wait(self, name: str, found: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first line of a worker that is so. Raises AssertionError where it does not come."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for line in self.said(name):
                if found(line):
                    return line
            time.sleep(0.05)
        raise AssertionError(f"{name} said {self.said(name)[-5:]}")

    def stop(self) -> None:
        for process in [self._lighthouse, *(process for ranks in self._ranks.values() for process in ranks)]:
            process.kill()
            process.join()


@contextmanager
def cluster(folder: Path, timeout: float = 2.0, expected: int = 1, grace: float | None = None) -> Iterator[Cluster]:
    made = Cluster(folder, timeout, expected, grace)
    try:
        yield made
    finally:
        made.stop()


def _lighthouse(port: int, timeout: float, grace: float | None) -> None:
    from qsr_engine.membership.quorum import start_lighthouse

    lighthouse = start_lighthouse(port, timeout, grace)
    while lighthouse:
        time.sleep(3600)


def _member(environment: dict[str, str], file: str, given: dict[str, Any]) -> None:
    os.environ.update(environment)
    os.environ["DS_ACCELERATOR"] = "cpu"
    with suppress(RuntimeError):
        multiprocessing.set_start_method("fork", force=True)
    import logging

    import torch

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    with open(file, "a", buffering=1) as out:  # a line at a time

        def say(what: str, **more: Any) -> None:
            out.write(json.dumps({"what": what, "time": time.time(), **more}) + "\n")

        try:
            train(say, Path(file).parent, **given)
        except Exception as error:
            say("error", type=type(error).__name__, text=str(error))
            raise
    os._exit(0)  # the interpreter's end takes a second, and nobody learns anything from it


def train(
    say: Callable[..., None],
    folder: Path,
    *,
    qsr: dict[str, Any],
    part: int,
    stage: int | None = None,
    optimizer: str = "adamw",
    seconds: float = 0.0,
    dies_at: int | None = None,
    freezes_at: int | None = None,
    nan_at: int | None = None,
    dies_in: tuple[str, int] | None = None,
    seed: int = 7,
    model_name: str = "mlp",
    waits_for: Path | None = None,
    facts: dict[str, str] | None = None,
    versions: dict[str, str] | None = None,
    waits: dict[int, tuple[str, str, int]] | None = None,
    waits_in: tuple[str, int, tuple[str, str, int]] | None = None,
) -> None:
    """One rank of a worker. It says "joined", "asks" before it asks for a quorum, every "boundary" with a digest of
    what it holds, and "finished".

    Args:
        folder: of what members say.
        part: of the data; the ranks of a worker have parts of their own.
        stage: of DeepSpeed; None: FSDP.
        seconds: that each step takes at least.
        dies_at: the step before which it is killed. freezes_at: the one before which it stops itself (SIGSTOP).
        nan_at: the step after which its parameters are not finite.
        dies_in: ("exchange" or "commit", the step of a boundary): it is killed when it is about to.
        seed: of the model.
        waits_for: it makes its engine when this file is there, so that many can begin at the same time.
        facts: that its loop adds to what must be the same on all members. versions: that it has in place of its own.
        waits: (worker, what it says, step) by the step before which this one waits until the other has said so.
        waits_in: as dies_in, and for what it waits there.
    """
    import torch

    from qsr_engine.engines import start
    from qsr_engine.membership.quorum import torchft_part
    from qsr_engine.membership.versions import versions as found_versions
    from tests.support import fsdp_engine, training
    from tests.support.sent import bytes_sent_since, sockets

    if versions is not None:
        mock.patch.object(start, "versions", return_value={**found_versions(), **versions}).start()
    if waits_for is not None:
        importlib.import_module("qsr_engine.engines.fsdp.initialize")  # which takes longer than the rest
        torchft_part("LighthouseClient")
    while waits_for is not None and not waits_for.exists():
        time.sleep(0.02)

    torch.manual_seed(seed)
    model = fsdp_engine.MODELS[model_name]()
    if seed != 7:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    if stage is None:
        engine = fsdp_engine.start(qsr, model, optimizer)
    else:
        engine = fsdp_engine.start_deepspeed(qsr, model, optimizer, stage)
    say("ready")
    _say_that_it_asks(say)
    if dies_in is not None:
        _do_in(engine, *dies_in, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if waits_in is not None:
        _do_in(engine, *waits_in[:2], lambda: _wait_for(folder, *waits_in[2]))
    engine.join(_WithFacts(facts) if facts is not None else None)
    state, rank = engine.local_steps, int(os.environ["RANK"])
    say("joined", step=state.step, round=state.round, names=engine.standing.names, digest=digest_of(engine))
    before = sockets()
    while not state.finished:
        step = state.step
        if step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == freezes_at:
            freezes_at = None
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(seconds)
        if waits is not None and step in waits:
            _wait_for(folder, *waits[step])
        inputs, targets = fsdp_engine.batch_of(model_name, part + rank, step)
        if nan_at == step:
            inputs = inputs * float("nan")
        started = time.monotonic()
        period = state.period
        engine.backward(training.loss(engine(inputs).float(), targets))
        boundary = engine.step()
        say("step", step=step)
        if boundary:
            say(
                "boundary",
                step=state.step,
                round=state.round,
                period=period,
                names=engine.standing.names,
                digest=digest_of(engine),
                took=time.monotonic() - started,
                lr=engine.optimizer.param_groups[0]["lr"],
                events=state.boundary.member.events,
                sent=bytes_sent_since(before),
                distance=state.relative_distance,
                recorder=engine.standing.recorder,
                late=state.costs.late,
            )
            before = sockets()
            state.boundary.member.events = []
    values = [value.flatten().tolist() for value in fsdp_engine.state_of(engine).values()]
    optimizer_state = digest_of_state(engine)
    say("finished", values=values, optimizer=optimizer_state)
    engine.destroy()


class _WithFacts(Loop):
    def __init__(self, facts: dict[str, str]) -> None:
        self._facts = facts

    def facts(self) -> dict[str, str]:
        return self._facts


def _say_that_it_asks(say: Callable[..., None]) -> None:
    from qsr_engine.membership.quorum import Members

    original = Members.ask

    def asks(*given: Any) -> Any:
        say("asks", step=given[1].step)
        return original(*given)

    Members.ask = asks  # type: ignore[method-assign, assignment]


def _wait_for(folder: Path, worker: str, what: str, step: int) -> None:
    file, end = folder / f"{worker}.0.jsonl", time.monotonic() + SECONDS
    while time.monotonic() < end:
        if any(line["what"] == what and line["step"] == step for line in _lines(file) if "step" in line):
            return
        time.sleep(0.02)
    raise AssertionError(f"{worker} did not say {what} {step}")


def _lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _do_in(engine: Any, what: str, step: int, do: Callable[[], None]) -> None:
    from qsr_engine.averaging import tentative
    from qsr_engine.membership.quorum import Members

    name, owner = {"exchange": ("add_up", tentative), "commit": ("ask", Members)}[what]
    original = getattr(owner, name)

    def does(*given: Any) -> Any:
        if engine.local_steps.step == step and (what == "exchange" or given[1].attempt):
            do()
        return original(*given)

    setattr(owner, name, does)


def digest_of(engine: Any) -> str:
    """Of the bits of all masters that this rank holds, and of what the next forward reads."""
    found = hashlib.sha256()
    tensors = [*engine._driver.replica.masters(), *engine.module.parameters(), *engine.module.buffers()]
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor).detach()
        found.update(local.float().contiguous().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def digest_of_state(engine: Any) -> dict[str, float]:
    """The sum of all elements of the optimizer's state, by its name."""
    replica = engine._driver.replica

    def total(value: Any) -> float:
        return float(value.double().sum()) if hasattr(value, "double") else float(value or 0)

    return {name: sum(map(total, replica.state(name))) for name in sorted(replica.state_names())}
