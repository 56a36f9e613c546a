"""Train for a given time while ranks are killed and frozen, runs are stopped, the disk fills and shards vanish.

    python -m benchmarks.soak --minutes 30 --seed 1 --out benchmarks/results

Two runs of one recipe start together, two workers each: one is left alone, the other has a fault every few seconds, and
is started again with `--resume` whenever it ends. Both have a checkpoint every EVERY steps. In the end:

    parameters   of every checkpoint that both runs have: the same bytes
    records      every step is there once, and as many samples were seen as there are in that many batches
    epochs       the ranks' parts of every epoch begun are all samples of it, each once
    checkpoints  at every moment there was a whole one once there had been one, never older than an earlier one

With --elastic the workers come and go instead (benchmarks/soak_elastic.py), for so many minutes, and then the same
recipe is trained by restarts and elastic, --against SECONDS each, with a failure every --pause seconds.

Exit code 1 if one of these does not hold. The run's folder lies on a tmpfs of its own where this may be mounted (root),
so that a full disk is a real one; without it that fault is left out, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from benchmarks import soak_elastic
from benchmarks.ranks import ENVIRONMENT
from benchmarks.report import Report, parser, table
from qsr_engine.checkpoint.find import find_alone
from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.data import read_index, write_digits
from qsr_engine.data.order import plan_epoch

EVERY = 400  # steps between checkpoints
RANKS, BATCH = 2, 24
RECIPE = """
model:
  name: timm/vit_tiny_patch16_224
  kwargs: {{img_size: 8, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}
engine: {engine}
data: {{shards: "{shards}", image_size: 8, augment: crop, retries: 4, retry_seconds: 0.25}}
batch: {{train_batch_size: {batch}}}
optimizer: {{type: AdamW, weight_decay: 0.05, gradient_clipping: 1.0}}
qsr:
  strategy: constant
  h_base: 8
  total_steps: 100000000
  lr: {{schedule: constant, peak: 1e-4}}
  faults: {{timeout_seconds: 5}}
logging: {{dir: "{folder}", name: {name}, every: 8, checkpoint_every: {every}, keep_checkpoints: {keep}}}
"""


class Soak:
    """The disturbed run, and what was seen of it."""

    def __init__(self, recipe: Path, run: Path, shards: Path, log: Path, seed: int, full_disk: bool) -> None:
        self.recipe, self.run, self.shards = recipe, run, shards
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.ends: Counter[int] = Counter()
        self.problems: list[str] = []
        self.digests: dict[int, str] = {}
        self.newest = 0
        self._log = log.open("w")
        self._process: subprocess.Popen[bytes] | None = None
        self.faults: list[Callable[[], None]] = [self.kill, self.freeze, self.stop, self.vanish, self.kill_all]
        self.faults += [self.fill] if full_disk else []

    def keep_running(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            self.ends[self._process.returncode] += 1
            self._process = None
        if self._process is None:
            self._process = start(self.recipe, self._log, "--restarts", "2")
            self.counts["starts"] += 1

    def ranks(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "RANK" in child.environ():
                        found.append(child)
        return found

    def kill(self) -> None:
        self._signal_one(signal.SIGKILL, "a rank killed")

    def freeze(self) -> None:
        self._signal_one(signal.SIGSTOP, "a rank frozen")

    def _signal_one(self, number: signal.Signals, what: str) -> None:
        ranks = self.ranks()
        if ranks:
            with contextlib.suppress(psutil.Error):
                self.random.choice(ranks).send_signal(number)
                self.counts[what] += 1

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(self.random.choice([signal.SIGTERM, signal.SIGUSR1]))
            self.counts["asked to stop"] += 1

    def kill_all(self) -> None:
        """As when the host goes down: everything of the run at once."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.Error):
            launcher = psutil.Process(self._process.pid)
            for process in [*launcher.children(recursive=True), launcher]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.counts["everything killed"] += 1

    def vanish(self) -> None:
        """A shard is away for a while, or cut in the middle."""
        shard = self.random.choice(sorted(self.shards.glob("train-*.tar")))
        aside = shard.with_suffix(".aside")
        shard.rename(aside)
        cut = self.random.random() < 0.5
        if cut:
            shard.write_bytes(aside.read_bytes()[: aside.stat().st_size // 2])
        self.counts["a shard cut" if cut else "a shard vanished"] += 1
        self.look(self.random.uniform(1, 6))
        aside.replace(shard)

    def fill(self) -> None:
        """The disk of the run's folder is full for a while."""
        filler = self.run.parent / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        self.counts["disk filled"] += 1
        self.look(self.random.uniform(4, 12))
        filler.unlink()

    def look(self, seconds: float) -> None:
        """Watch the checkpoints for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.keep_running()
            self.see_checkpoints()
            time.sleep(0.2)

    def see_checkpoints(self) -> None:
        folder = self.run / "checkpoints"
        try:
            newest, manifest = find_alone(folder)
        except (CheckpointError, FileNotFoundError) as error:  # a folder may be deleted while it is looked at
            if self.newest and not _is_there(folder, self.newest):
                self.problems.append(f"after a checkpoint of step {self.newest} there was none: {error}")
            return
        if manifest.step < self.newest and not _is_there(folder, self.newest):
            self.problems.append(f"after a checkpoint of step {self.newest} the newest was {manifest.step}")
        self.newest = max(self.newest, manifest.step)
        note(newest, manifest.step, self.digests)

    def end(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self.ends[self._process.wait(60)] += 1
            except subprocess.TimeoutExpired:  # a frozen rank: what it would have saved is missing, no more
                self.kill_all()
        self.see_checkpoints()
        self._log.close()


def _is_there(folder: Path, step: int) -> bool:
    """Looked at again: a newer one may have come, and this one gone, in between."""
    with contextlib.suppress(CheckpointError, OSError):
        return find_alone(folder)[1].step >= step
    return False


def note(folder: Path, step: int, digests: dict[int, str]) -> None:
    if step % EVERY == 0 and step not in digests:
        with contextlib.suppress(OSError):
            digests[step] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def start(recipe: Path, log: object, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qsr_engine", "train", str(recipe), "--ranks", str(RANKS), "--resume", *words]
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT})  # type: ignore[call-overload,no-any-return]


def write_recipe(folder: Path, runs: Path, shards: Path, name: str, engine: str, keep: str) -> Path:
    path = folder / f"{name}.yaml"
    text = RECIPE.format(engine=engine, shards=shards, batch=BATCH, folder=runs, name=name, every=EVERY, keep=keep)
    path.write_text(text)
    return path


def check(soak: Soak, calm: Path, shards: Path) -> dict[str, object]:
    """What must hold in the end; problems are added to the soak's."""
    theirs: dict[int, str] = {}
    for folder in (calm / "checkpoints").glob("step-*"):
        note(folder, int(folder.name.split("-")[1]), theirs)
    both = sorted(set(soak.digests) & set(theirs))
    unequal = [step for step in both if soak.digests[step] != theirs[step]]
    soak.problems += [f"the parameters of step {step} differ from the undisturbed run's" for step in unequal]
    if not both:
        soak.problems.append("no checkpoint is in both runs")
    lines = (soak.run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    steps = [record["step"] for record in records]
    if steps != list(range(8, 8 * len(steps) + 8, 8)):
        soak.problems.append("records are missing, or are there twice")
    soak.problems += [
        f"step {record['step']}: {record['images_seen']} samples"
        for record in records
        if record["images_seen"] != BATCH * record["step"]
    ]
    split = read_index(str(shards)).split("train")
    epochs = steps[-1] * BATCH // split.samples + 1
    everything = Counter((shard.name, number) for shard in split.shards for number in range(shard.samples))
    for epoch in range(epochs):
        slices = [piece for rank in range(RANKS) for piece in plan_epoch(split, 0, epoch, rank, RANKS)]
        if Counter((piece.name, n) for piece in slices for n in range(piece.start, piece.stop)) != everything:
            soak.problems.append(f"epoch {epoch} is not covered")
    failed = sum(record.get("checkpoints_failed", 0) > 0 for record in records[-1:])
    return {
        "steps": steps[-1],
        "epochs begun": epochs,
        "checkpoints compared": len(both),
        "checkpoints that failed": records[-1].get("checkpoints_failed", 0) if failed else 0,
    }


def shown(soak: Soak, found: dict[str, object], minutes: float, full_disk: bool) -> str:
    rows = [
        *sorted(soak.counts.items()),
        *((f"ended with exit code {code}", count) for code, count in sorted(soak.ends.items())),
        *found.items(),
    ]
    ending = (
        "**Problems:**\n\n" + "\n".join(f"- {problem}" for problem in soak.problems[:20])
        if soak.problems
        else "No problem: parameters of all compared checkpoints are the same bytes, every record is there once, "
        "every epoch is covered, and no checkpoint was lost."
    )
    return "\n\n".join(
        [
            f"{minutes:.0f} minutes. Two workers of one rank, and beside them the undisturbed run of two."
            + ("" if full_disk else " The disk was not filled: a tmpfs could not be mounted."),
            table(("what", "times"), [[name, str(value)] for name, value in rows]),
            "Exit code 75: stopped when asked to, and saved. -9: killed with everything else. Others: an error that "
            "names the rank, the shard or the checkpoint.",
            ending,
        ]
    )


def elastic(options: argparse.Namespace) -> int:
    """Workers that come and go."""
    report = Report("soak", options, ("torch", "torchft"))
    with tempfile.TemporaryDirectory(prefix="qsr-soak-") as at:
        folder, figures = Path(at), dict[str, object]()
        if options.minutes:
            found, counts = soak_elastic.soak(folder, 60 * options.minutes, options.seed, options.grace_seconds)
            report.add(soak_elastic.shown(found, counts, options.minutes, options.grace_seconds))
            figures |= {"found": found, "faults": dict(counts)}
        if options.against:
            write_digits(folder / "shards")
            against = soak_elastic.against_restarts(folder, folder / "shards", options.against, options.pause)
            report.add(soak_elastic.compared(against, options.pause))
            figures["against"] = against
        report.save(**figures)
        if figures.get("found") and (found["steps taken twice"] or found["boundaries after which members differed"]):
            return 1
    return 0


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--minutes", type=float, default=30.0)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--engine", choices=["deepspeed", "fsdp"], default="fsdp")
    made.add_argument("--elastic", action="store_true", help="workers that come and go")
    made.add_argument("--against", type=float, default=0.0, metavar="SECONDS", help="of each way; 0: leave it out")
    made.add_argument("--grace-seconds", type=float, help="of the members of --elastic; default: none")
    made.add_argument("--pause", type=float, default=60.0, help="seconds between two failures of these")
    options = made.parse_args()
    if options.elastic:
        return elastic(options)
    report = Report("soak", options, ("torch", "deepspeed"))
    with tempfile.TemporaryDirectory(prefix="qsr-soak-") as at, contextlib.ExitStack() as stack:
        folder = Path(at)
        shards, small = folder / "shards", folder / "small"
        write_digits(shards)
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)]
        full_disk = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        if full_disk:
            stack.callback(subprocess.run, ["umount", "--lazy", str(small)], check=False)
        own = folder / "own-shards"  # those of the disturbed run, which are spoiled
        write_digits(own)
        calm_recipe = write_recipe(folder, folder, shards, "calm", options.engine, "null")
        recipe = write_recipe(folder, small, own, "disturbed", options.engine, "3")
        soak = Soak(recipe, small / "disturbed", own, folder / "disturbed.log", options.seed, full_disk)
        calm_log = stack.enter_context((folder / "calm.log").open("w"))
        calm = start(calm_recipe, calm_log)
        began = time.monotonic()
        while time.monotonic() - began < 60 * options.minutes:
            soak.look(soak.random.uniform(10, 40))
            soak.random.choice(soak.faults)()
        soak.end()
        while calm.poll() is None and not _is_there(folder / "calm" / "checkpoints", soak.newest // EVERY * EVERY):
            time.sleep(1)
        calm.send_signal(signal.SIGTERM)
        calm.wait(120)
        found = check(soak, folder / "calm", shards)
        minutes = (time.monotonic() - began) / 60
        report.add(shown(soak, found, minutes, full_disk))
        ends = {str(code): count for code, count in soak.ends.items()}
        report.save(
            minutes=minutes,
            faults=dict(soak.counts),
            ends=ends,
            found=found,
            problems=soak.problems,
            full_disk=full_disk,
        )
        if soak.problems:
            kept = Path(tempfile.mkdtemp(prefix="qsr-soak-log-"))
            (kept / "disturbed.log").write_bytes((folder / "disturbed.log").read_bytes())
            print(f"the disturbed run's output: {kept}")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
