"""What `python -m benchmarks.soak --elastic` does: workers that come and go, under faults, and against restarts.

Part 1: WORKERS members train; every few seconds one is killed, frozen for a while, or joins, or the lighthouse is
killed and comes back. Every member writes a line a boundary, from which follow:

    lost       seconds by which a boundary at which somebody had left, or was missing, took longer than the median of
               the others; boundaries during which the lighthouse was away are counted by themselves
    twice      steps that a member took twice
    different  boundaries after which two members did not hold the same bits

Part 2: the same recipe by `qsr train` with `--restarts`, and with `--elastic`; in both a worker is killed every PAUSE
seconds. Seconds until both have taken as many steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.ranks import ENVIRONMENT
from benchmarks.report import table

WORKERS, PERIOD, TIMEOUT = 3, 20, 3.0
MOST_WORKERS = 5


def port() -> int:
    return random.randrange(12_000, 32_000)


class Elastic:
    """The members of part 1, and what was done to them."""

    def __init__(self, folder: Path, seed: int, grace: float | None) -> None:
        self.folder, self.random, self.counts, self._grace = folder, random.Random(seed), Counter[str](), grace
        self.outages: list[tuple[float, float]] = []  # of the lighthouse
        self._away: float | None = None  # since when it is
        self.port, self.number = port(), 0
        self._log = (folder / "log").open("w")
        self.lighthouse: subprocess.Popen[bytes] | None = None
        self.members: dict[str, subprocess.Popen[bytes]] = {}
        self.frozen: dict[str, float] = {}  # and when they wake up
        self.light()

    def light(self) -> None:
        words = ["lighthouse", "--port", str(self.port), "--timeout-seconds", str(TIMEOUT)]
        words += ["--grace-seconds", str(self._grace)] if self._grace else []
        command = [sys.executable, "-m", "qsr_engine", *words]
        self.lighthouse = subprocess.Popen(command, stdout=self._log, stderr=self._log)

    def join(self) -> None:
        name = f"m{self.number}"
        self.number += 1
        environment = {
            **os.environ,
            **ENVIRONMENT,
            **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"},
            "MASTER_PORT": str(port()),
            "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{self.port}",
            "QSR_WORKER": name,
            "QSR_EXPECTED_WORKERS": str(WORKERS),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        words = [
            str(self.folder / f"{name}.jsonl"),
            str(10**8),
            str(PERIOD),
            "0.02",
            str(TIMEOUT),
            str(self._grace or 0),
        ]
        command = [sys.executable, "-m", "benchmarks.soak_member", *words]
        self.members[name] = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)

    def _takes_part(self, name: str) -> bool:
        """A member that has begun to write has joined; the others still start."""
        return (self.folder / f"{name}.jsonl").exists()

    @property
    def begun(self) -> bool:
        return all(map(self._takes_part, self.members))

    def fault(self) -> None:
        awake = [name for name in self.members if name not in self.frozen and self._takes_part(name)]
        faults = ["killed", "killed", "frozen", "joined", "lighthouse killed"]
        what = self.random.choice(faults + ["held up"] * 3 if self._grace else faults)
        if what in ("killed", "frozen", "held up") and len(awake) < 2:
            what = "joined"
        if what == "joined" and len(self.members) >= MOST_WORKERS:
            what = "killed" if len(awake) > 1 else "nothing"
        if what == "killed":
            name = self.random.choice(awake)
            self.members.pop(name).kill()
        elif what in ("frozen", "held up"):  # the latter for less than the time-out: it is late, and has not left
            name = self.random.choice(awake)
            self.members[name].send_signal(signal.SIGSTOP)
            seconds = self.random.uniform(0.5, 3) * TIMEOUT if what == "frozen" else self.random.uniform(1.2, 2.2)
            self.frozen[name] = time.monotonic() + seconds
        elif what == "joined":
            self.join()
        elif what == "lighthouse killed":
            assert self.lighthouse is not None
            self._away = self._away or time.time()
            self.lighthouse.kill()
            self.lighthouse.wait()
            time.sleep(self.random.uniform(0.2, 3))
            self.light()
        self.counts[what] += 1

    def look(self, seconds: float) -> None:
        """Let time pass; who sleeps is woken up, and who has ended by itself is counted and replaced."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._away is not None and self._answers():
                self.outages.append((self._away, time.time()))
                self._away = None
            for name, wakes in list(self.frozen.items()):
                if time.monotonic() > wakes:
                    del self.frozen[name]
                    self.members[name].send_signal(signal.SIGCONT)
            for name, process in list(self.members.items()):
                if process.poll() is not None:
                    self.counts[f"ended with exit code {process.returncode}"] += 1
                    del self.members[name]
            while len(self.members) < 2:
                self.join()
                self.counts["joined"] += 1
            time.sleep(0.1)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.5):
            return True
        return False

    def end(self) -> None:
        if self._away is not None:
            self.outages.append((self._away, time.time()))
        for process in [*self.members.values(), self.lighthouse]:
            if process is not None:
                process.kill()
                process.wait()
        self._log.close()


def found_in(folder: Path, outages: list[tuple[float, float]]) -> dict[str, Any]:
    """What the lines of all members say.

    Args:
        outages: when the lighthouse was away, in seconds since 1970.
    """
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("m*.jsonl"))
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    rows = [line for line in lines if "digest" in line]
    digests: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        digests[row["step"]].add(row["digest"])
    calm = [row["took"] for row in rows if not row["left"]]
    typical = statistics.median(calm) if calm else 0.0
    after = [row for row in rows if row["left"] and "." in row["left"][0]]
    away = [
        row for row in after if any(row["time"] - row["took"] < e + TIMEOUT and b < row["time"] for b, e in outages)
    ]
    lost = [row["took"] - typical for row in after if row not in away]
    twice, last = 0, dict[str, int]()
    for row in rows:
        twice += max(0, last.get(row["name"], -1) - row["taken"][0] + 1)
        last[row["name"]] = row["taken"][1]
    return {
        "boundaries": len(digests),
        "steps": max(digests, default=0),
        "members joined": sum("joined" in line for line in lines),
        "averagings that failed and were repeated": sum(
            max((row["repeated"] for row in rows if row["name"] == name), default=0)
            for name in {r["name"] for r in rows}
        ),
        "seconds of an undisturbed boundary, median": round(typical, 4),
        "movements of late members in averages": sum(len(row["late"]) for row in rows if row["recorder"]),
        "boundaries at which somebody had left, by member": len(lost),
        "seconds lost by others at one, median": round(statistics.median(lost), 2) if lost else None,
        "seconds lost by others at one, worst": round(max(lost), 2) if lost else None,
        "more of them, in which the lighthouse was away": len(away),
        "seconds it was away, in all": round(sum(end - begin for begin, end in outages), 1),
        "steps taken twice": twice,
        "boundaries after which members differed": sum(len(of_step) > 1 for of_step in digests.values()),
    }


def soak(folder: Path, seconds: float, seed: int, grace: float | None) -> tuple[dict[str, Any], Counter[str]]:
    """Part 1."""
    run = Elastic(folder, seed, grace)
    try:
        for _ in range(WORKERS):
            run.join()
        began = time.monotonic()
        while not run.begun:
            run.look(1)
        while time.monotonic() - began < seconds:
            run.fault()
            run.look(run.random.uniform(4, 12))
    finally:
        run.end()
    return found_in(folder, run.outages), run.counts


RECIPE = """
model:
  name: timm/vit_tiny_patch16_224
  kwargs: {{img_size: 8, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}
engine: fsdp
data: {{shards: "{shards}", image_size: 8, augment: crop}}
batch: {{train_batch_size: 24, on_other_ranks: per_rank}}
optimizer: {{type: AdamW, weight_decay: 0.05, gradient_clipping: 1.0}}
qsr:
  strategy: constant
  h_base: 100
  total_steps: 1000000
  lr: {{schedule: constant, peak: 1e-4}}
  faults: {{timeout_seconds: 5}}
logging: {{dir: "{folder}", name: {name}, every: 20, checkpoint_every: 100, keep_checkpoints: 2, tensorboard: false}}
"""


def against_restarts(folder: Path, shards: Path, seconds: float, pause: float) -> dict[str, Any]:
    """Part 2: one way after the other, so long each."""
    ways = {"restart": ["--restarts", "1000"], "elastic": ["--elastic", "--restarts", "1000"]}
    curves = {}
    for name, words in ways.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(RECIPE.format(shards=shards, folder=folder, name=name))
        sets = ["--set", f"qsr.membership.timeout_seconds={TIMEOUT}"] if name == "elastic" else []
        curves[name] = _steps_over_time(folder / name, [str(recipe), "--ranks", "3", *words, *sets], seconds, pause)
    common = min(curve[-1][1] for curve in curves.values())
    return {
        "steps that both have taken": common,
        **{
            f"seconds until then, {name}": round(next(at for at, step in curve if step >= common), 1)
            for name, curve in curves.items()
        },
        **{f"steps in {seconds:.0f} s, {name}": curve[-1][1] for name, curve in curves.items()},
    }


def _steps_over_time(run: Path, words: list[str], seconds: float, pause: float) -> list[tuple[float, int]]:
    """(seconds since the first record, step), while a rank is killed every `pause` seconds."""
    command = [sys.executable, "-m", "qsr_engine", "train", *words]
    environment = {**os.environ, **ENVIRONMENT}
    with run.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        curve: list[tuple[float, int]] = []
        began, killed = None, 1
        try:
            while began is None or time.monotonic() - began < seconds:
                time.sleep(0.2)
                step = _last_step(run / "metrics.jsonl")
                if step and began is None:
                    began = time.monotonic()
                if began is not None:
                    curve.append((time.monotonic() - began, max(step, curve[-1][1] if curve else 0)))
                    if time.monotonic() - began > killed * pause:
                        _kill_one(process)
                        killed += 1
        finally:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()
    return curve


def _last_step(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads(path.read_text().splitlines()[-1])["step"])
    return 0


def _kill_one(process: subprocess.Popen[bytes]) -> None:
    """A rank that is not the recorder's: the restart way loses as much whichever it is."""
    ranks = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "RANK" in child.environ() and "RANK" not in psutil.Process(child.ppid()).environ():
                    ranks.append(child)
    if ranks:
        max(ranks, key=lambda rank: rank.create_time()).kill()


def shown(found: dict[str, Any], counts: Counter[str], minutes: float, grace: float | None) -> str:
    late = f"{grace:g} s of grace" if grace else "no grace"
    rows = [*sorted(counts.items()), *found.items()]
    return "\n\n".join(
        [
            f"{minutes:.1f} minutes, {WORKERS} workers of one rank at the start and at most {MOST_WORKERS}, rounds of "
            f"{PERIOD} steps, a time-out of {TIMEOUT:.0f} s, {late}; all of them share the cores of this machine.",
            table(("what", "times"), [[name, str(value)] for name, value in rows]),
        ]
    )


def compared(found: dict[str, Any], pause: float) -> str:
    text = f"The same recipe with 3 workers, one of which is killed every {pause:.0f} s, by restarts and elastic:"
    return text + "\n\n" + table(("what", ""), [[name, str(value)] for name, value in found.items()])
