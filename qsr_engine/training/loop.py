"""The training loop of a recipe: wiring only. It does not ask which engine it drives.

    for every step      micro-batches: engine(images), engine.backward(loss), engine.step()
    at a boundary       evaluation on the averaged parameters, and a checkpoint, when one is due
    every few steps     a record to the monitor, on rank 0

Between boundaries nothing here crosses ranks: rank 0 logs its own loss and its own times. What it logs of other
workers they tell it at a boundary.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_engine.averaging import all_gather_flat
from qsr_engine.checkpoint.find import any_here, find_alone
from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.checkpoint.together import gathered
from qsr_engine.config.batch import Batch, check_world_size
from qsr_engine.config.digest import flatten
from qsr_engine.config.recipe import Recipe, batch_on_other_ranks, resolve_recipe_batch
from qsr_engine.config.recipe_file import dump_recipe, load_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import Index
from qsr_engine.data.decoding import REGIONS
from qsr_engine.data.device import MixUp, Normalise, on_device
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.data.order import seed_for
from qsr_engine.data.views import SMALL
from qsr_engine.membership.facts import check_agreement
from qsr_engine.membership.signals import StoppedError, stops_on_signals
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.records import Record, WorkersRecord
from qsr_engine.records.run_folder import (
    CHECKPOINTS,
    RECIPE,
    cannot_finish,
    check_run_folder,
    check_unfinished,
    leave_unfinished_run,
    lock_run_folder,
    open_run_folder,
)
from qsr_engine.training.from_recipe import Engine, make_engine
from qsr_engine.training.models import create_model, has_batch_norm, reestimated_batch_norm
from qsr_engine.training.sharpness import largest_eigenvalue

MODEL_FILE = "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DivergenceError(RuntimeError):
    """The loss is not finite: training on would burn hours for nothing."""


class UnsavedError(CheckpointError):
    """The run was asked to stop, and its checkpoint could not be written."""


def train(recipe: Recipe, index: Index, *, resume: bool = False) -> dict[str, Any]:
    """Train a resolved recipe in this process, one rank of those that a launcher started.

    Args:
        recipe: as resolve_recipe() gives it.
        index: of recipe.data.shards, whose shards have been checked.
        resume: go on from the newest whole checkpoint in the run's folder, or begin where there is none.
    Returns:
        The final figures, as in the run's `summary.json`.
    Raises:
        ConfigError, AgreementError, BoundaryError, CheckpointError, CollectiveError, DataError, DivergenceError,
            HostError: the message is for the user.
        StoppedError: the run was asked to stop, and did so.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_world_size(ranks, recipe.qsr.worker_size)
    batch = batch_for(recipe, ranks, resume=resume)
    lock = None
    if resume:
        check_unfinished(recipe.run_dir)
        check_same_recipe(recipe)
        if rank == 0 and recipe.run_dir.exists():
            lock = lock_run_folder(recipe.run_dir)
    elif rank == 0:
        check_run_folder(recipe.run_dir)
    if rank == 0 and not REGIONS and recipe.data.image_size > SMALL:
        warnings.warn(
            "qsr_engine was installed without a C compiler or libjpeg-turbo's headers, so JPEGs are decoded whole, "
            'which takes longer; see "Train a recipe" in the README',
            stacklevel=2,
        )
    share_cores()
    model, index = _make_model(recipe, index)
    engine = make_engine(recipe, batch, model)
    if recipe.data.decoder == "gpu" and engine.device.type != "cuda":
        raise ConfigError(f"data.decoder is 'gpu', and this rank trains on {engine.device.type}; write decoder: cpu")
    check_agreement({"recipe": _shared(recipe), "data": index.digest()}, engine.device)
    torch.manual_seed(recipe.seed + 1 + rank)  # dropout differs between ranks
    client = _load(engine, recipe, str(index.digest())) if resume else {}
    step = engine.local_steps.step
    if rank == 0 and (step == 0 or not recipe.run_dir.exists()):
        if resume:
            leave_unfinished_run(recipe.run_dir)
        open_run_folder(recipe.run_dir, dump_recipe(recipe))
        lock = lock_run_folder(recipe.run_dir)
    loaders = {"rank": rank, "ranks": ranks, "batch_size": batch.micro}
    total_steps = recipe.qsr.total_steps
    assert total_steps is not None, "resolve_recipe() fills it in"
    with Monitor(
        recipe.run_dir, total_steps, tensorboard=recipe.logging.tensorboard, enabled=rank == 0, from_step=step
    ) as monitor:
        run = _Run(
            recipe,
            engine,
            TrainLoader(recipe.data.shards, index, recipe.data, seed=recipe.seed, **loaders),
            EvalLoader(recipe.data.shards, index, recipe.data, **loaders),
            monitor,
            batch,
            client,
            index,
        )
        with stops_on_signals(engine.local_steps.request_stop), engine.local_steps.liveness.explained():
            run.loop()
            summary = run.summary()
            averaged = engine.averaged_state_dict()
            if rank == 0:
                _save_model(averaged, recipe)
                monitor.summary(**summary)
    if lock is not None:
        lock.close()
    engine.local_steps.liveness.close()
    return summary


def batch_for(recipe: Recipe, ranks: int, *, resume: bool) -> Batch:
    """Batch sizes for so many ranks; rank 0 says so where they are others than before.

    Raises:
        ConfigError: as resolve_recipe_batch() and batch_on_other_ranks().
    """
    try:
        _, manifest = find_alone(recipe.run_dir / CHECKPOINTS)
    except CheckpointError:  # of this host; engine.load_checkpoint() says what is wrong, and on which
        return resolve_recipe_batch(recipe, ranks)
    if not resume:
        return resolve_recipe_batch(recipe, ranks)
    then = int(manifest.layout["workers"]) * int(manifest.layout["worker_size"])
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    old = Batch(*(int(manifest.config[key]) for key in sizes))
    batch = batch_on_other_ranks(recipe, ranks, old)
    if then != ranks and os.environ.get("RANK") == "0":
        warnings.warn(
            f"the run goes on with {ranks} ranks instead of {then}: a step has {batch.train} samples "
            f"({old.train} before), {batch.micro} in a micro-batch and {batch.accumulation} micro-batches on every "
            "rank; the learning rate and H are functions of the step, and stay",
            stacklevel=2,
        )
    return batch


def _make_model(recipe: Recipe, index: Index) -> tuple[nn.Module, Index]:
    """The recipe's model for these data, the same on every rank, and the data's index with a name for every class."""
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model, index.class_count, recipe.data.image_size)
    if recipe.batch_norm is not None and not has_batch_norm(model):
        raise ConfigError(f"batch_norm is given, and {recipe.model.name} has no batch norm; leave it out")
    if index.classes is None:  # so that a label that is too large is found where it is read
        names = [str(label) for label in range(recipe.model.kwargs["num_classes"])]
        index = index.model_copy(update={"classes": names})
    return model, index


def _shared(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that must be the same on every rank; hosts may keep shards and runs in other places."""
    return recipe.model_dump(exclude={"data": {"shards", "cache_dir", "cache_gb"}, "logging": {"dir"}})


def share_cores() -> None:
    """On a CPU, give each rank of this host its share of the cores, unless OMP_NUM_THREADS says another number."""
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        here = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"  # deepspeed's, torchrun's
        torch.set_num_threads(max(1, cores // int(here)))


def check_same_recipe(recipe: Recipe) -> None:
    """Compare a recipe with the one that the run in its folder was begun with.

    What may differ: where things are, how often something is written, and what another number of ranks needs.

    Raises:
        ConfigError: something else differs; every difference is named.
    """
    path = recipe.run_dir / RECIPE
    if not path.exists():
        return
    then, now = (dict(flatten(r.model_dump())) for r in (load_recipe(path), recipe))
    lines = [
        f"  {key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key) and not key.startswith(_MAY_DIFFER)
    ]
    if lines:
        raise ConfigError(
            f"{recipe.run_dir}: the recipe is not the one that this run was begun with:\n" + "\n".join(lines) + "\n"
            "Resume it with the same recipe, or begin another run with `--set logging.name=NAME`"
        )


_MAY_DIFFER = (
    "data.shards",
    "data.loader_processes",
    "data.max_bad_samples",
    "data.retr",
    "data.cache_",
    "logging.",
    "qsr.worker_size",
    "qsr.on_other_workers",
    "batch.train_micro_batch_size_per_gpu",
    "batch.gradient_accumulation_steps",
    "batch.on_other_ranks",
    "qsr.faults.",
    "precision.",
    "fsdp.",
)


def _load(engine: Engine, recipe: Recipe, data: str) -> dict[str, Any]:
    """Go on from the newest whole checkpoint. Returns what this rank saved in it; {} if there is none."""
    folder = recipe.run_dir / CHECKPOINTS
    if not any(gathered(any_here(folder))):
        return {}
    _, client = engine.load_checkpoint(folder)
    client = client or {}
    if client.get("data", data) != data:
        raise ConfigError(
            f"{folder}: the run was trained on other data (the index of its shards differs); give it the same, or "
            "begin another run with `--set logging.name=NAME`"
        )
    return client


def _save_model(state: dict[str, Tensor], recipe: Recipe) -> None:
    """The averaged model as safetensors; timm's and torchvision's models load it with load_state_dict().

    Raises:
        ConfigError: there is no room, or nothing can be written any more; no part of it is left.
    """
    path = recipe.run_dir / MODEL_FILE
    temporary = path.with_suffix(".tmp")
    try:
        save_file(state, temporary, metadata={"format": "pt"})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        shutil.copymode(recipe.run_dir / RECIPE, temporary)  # safetensors makes files that only their owner reads
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_finish(path, error) from error


@dataclass
class _Clock:
    """Where the wall-clock time goes, in seconds; evaluation and checkpoints count nowhere."""

    started: float = field(default_factory=time.perf_counter)
    data: float = 0.0
    elsewhere: float = 0.0

    def training(self) -> float:
        return time.perf_counter() - self.started - self.elsewhere


def _warn_of(skipped: Sequence[str]) -> None:
    for text in skipped:
        warnings.warn(f"skipped: {text}", stacklevel=3)  # Python shows the same text once


class _Due:
    """Something that happens every so many steps, each time at the next boundary; with None, never."""

    def __init__(self, every: int | None, step: int) -> None:
        self._every = every
        self._next = math.inf if every is None else (step // every + 1) * every

    def now(self, step: int) -> bool:
        if self._every is None or step < self._next:
            return False
        self._next = (step // self._every + 1) * self._every
        return True


class _Run:
    """One run in progress."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        train: TrainLoader,
        evaluation: EvalLoader,
        monitor: Monitor,
        batch: Batch,
        client: dict[str, Any],
        index: Index,
    ) -> None:
        self.recipe = recipe
        self.engine = engine
        self.skipped_samples: set[str] = set(client.get("skipped_samples", ()))
        self._started_at = engine.local_steps.step
        self._images_before = int(client.get("images_seen", self._started_at * batch.train))
        # A rank's stream goes on where the samples seen so far would end if this many ranks had seen them: with the
        # same ranks exactly where it was. With others an epoch is whole again from the next one on.
        position = self._images_before // (batch.micro * dist.get_world_size())
        self.batches = train.batches(position, self.skipped_samples, engine.device)
        self._index = index
        self.evaluation = evaluation
        self.monitor = monitor
        self.batch = batch
        self.normalise = Normalise(engine.device, DTYPES[recipe.precision.dtype])
        self.mixup = MixUp(recipe.data.mixup, len(index.classes or ())) if recipe.data.mixup > 0 else None
        self.clock = _Clock()
        self.accuracy = self.loss = math.nan
        self._losses: list[Tensor] = []
        self._round_losses: list[Tensor] = []  # since the workers last told theirs
        self._told: tuple[float, ...] = (0.0, 0.0, 0.0)  # what _seconds() was then
        self.checkpoints_failed = 0  # that could not be written, so far
        self._logged = (0, 0.0, 0.0)  # step, training seconds and seconds of waiting for data at the last record
        if recipe.batch_norm is not None:
            engine.averaged_model = self._reestimated
        if client:
            self._resume(client)

    def loop(self) -> None:
        state, logging = self.engine.local_steps, self.recipe.logging
        evaluation = _Due(logging.eval_every or state.qsr.total_steps, state.step)
        checkpoint = _Due(logging.checkpoint_every, state.step)
        workers = _Due(logging.every, state.step)
        while not state.finished:
            before: dict[str, Any] = {"round": state.round, "period": state.period, "lr": state.learning_rate}
            boundary = self._step()
            if boundary and (workers.now(state.step) or state.finished):
                self._log_workers()
            evaluated: dict[str, Any] = {}
            if boundary and (evaluation.now(state.step) or state.finished):
                evaluated = self._evaluate()
            if evaluated or state.step % logging.every == 0:
                self._log(before, evaluated)
            if boundary and (checkpoint.now(state.step) or state.stopping) and not state.finished:
                self._save()
            if state.stopping and not state.finished:
                raise StoppedError(
                    f"{self.recipe.run_dir}: the run was asked to stop, and has stopped after step {state.step} of "
                    f"{state.qsr.total_steps}, on a boundary; it goes on with `--resume`"
                )

    def _save(self) -> None:
        """A checkpoint; the position in the data is the step, and what has not been logged yet goes with it."""
        started = time.perf_counter()
        client = {
            "seconds": [self.clock.training(), self.clock.data],
            "logged": list(self._logged),
            "data": str(self._index.digest()),
            "ranks": dist.get_world_size(),
            "images_seen": self._images_seen,
            "losses": [loss.item() for loss in self._losses],
            "since_told": [value - told for value, told in zip(self._seconds(), self._told, strict=True)],
            "round_losses": [loss.item() for loss in self._round_losses],
            "skipped_samples": sorted(self.skipped_samples),
            "checkpoints_failed": self.checkpoints_failed,
        }
        folder, keep = self.recipe.run_dir / CHECKPOINTS, self.recipe.logging.keep_checkpoints
        tag = f"step-{self.engine.local_steps.step:08d}"
        try:
            self.engine.save_checkpoint(folder, tag=tag, client_state=client, keep=keep)
        except CheckpointError as error:  # on all ranks alike
            self._note_failed_checkpoint(error)
        self.clock.elsewhere += time.perf_counter() - started

    def _note_failed_checkpoint(self, error: CheckpointError) -> None:
        """Training goes on without it, and a run that was asked to stop ends with the error; both say what is left."""
        self.checkpoints_failed += 1
        try:
            there = f"the last whole one is {find_alone(self.recipe.run_dir / CHECKPOINTS)[0].name}"
        except CheckpointError:
            there = "there is no whole one yet"
        state = self.engine.local_steps
        if state.stopping:
            raise UnsavedError(f"the run was asked to stop, and its checkpoint failed; {there}. {error}") from error
        if dist.get_rank() == 0:
            warnings.warn(
                f"step {state.step}: the checkpoint could not be written, and {there}; training goes on, and the next "
                f"one is tried at its own time. {error}",
                stacklevel=3,
            )

    def _resume(self, client: dict[str, Any]) -> None:
        self.checkpoints_failed = client.get("checkpoints_failed", 0)
        training, self.clock.data = client["seconds"]
        self.clock.started -= training
        self._logged = (client["logged"][0], client["logged"][1], client["logged"][2])
        if client["ranks"] == dist.get_world_size():  # else they are rank 0's of other batches
            self._losses, self._round_losses = (
                [torch.tensor(loss, device=self.engine.device) for loss in client.get(name, ())]
                for name in ("losses", "round_losses")
            )
        since = client.get("since_told", (0.0, 0.0, 0.0))
        self._told = tuple(value - before for value, before in zip(self._seconds(), since, strict=True))

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """Pictures as the model reads them, and labels or, mixed, shares of classes."""
        started = time.perf_counter()
        batch = next(self.batches)
        self.clock.data += time.perf_counter() - started
        _warn_of(batch.skipped)
        self.skipped_samples.update(batch.skipped)
        images, labels = self.normalise(batch.images), batch.labels
        return (images, labels) if self.mixup is None else self.mixup(images, labels)

    def _step(self) -> bool:
        """One optimizer step. Returns True at a boundary."""
        boundary = False
        for _ in range(self.batch.accumulation):
            images, labels = self._next_batch()
            scores = self.engine(images)
            loss = F.cross_entropy(scores.float(), labels, label_smoothing=self.recipe.label_smoothing)
            self.engine.backward(loss)
            self._losses.append(loss.detach())
            self._round_losses.append(loss.detach())
            boundary = self.engine.step()
        return boundary

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Accuracy (%) and loss over the whole evaluation split, on the averaged parameters, over all ranks."""
        started = time.perf_counter()
        self.engine.local_steps.wait()
        if self.recipe.batch_norm is None:
            self.engine.local_steps.average_buffers()
        totals = torch.zeros(3, dtype=torch.float64, device=self.engine.device)  # samples, right ones, summed loss
        with self.engine.averaged_model():
            self.engine.eval()
            for images, labels in self._evaluation_batches():
                self.engine.local_steps.liveness.moved()
                scores = self.engine.module(self.normalise(images)).float()
                right = (scores.argmax(1) == labels).sum()
                loss = F.cross_entropy(scores, labels, reduction="sum", ignore_index=-1)
                totals += torch.stack([(labels >= 0).sum(), right, loss]).double()
        dist.all_reduce(totals)
        self.engine.train()
        samples, right, loss = totals.tolist()
        self.accuracy, self.loss = 100 * right / max(1, samples), loss / max(1, samples)
        evaluated = {"eval_accuracy": self.accuracy, "eval_loss": self.loss}
        if self.recipe.logging.sharpness_samples:
            evaluated["sharpness"] = self._sharpness(self.recipe.logging.sharpness_samples)
        self.clock.elsewhere += time.perf_counter() - started
        return evaluated

    def _sharpness(self, samples: int) -> float:
        """The sharpness of the averaged model on pictures without augmentation, on rank 0; the others wait for it."""
        state = self.engine.averaged_state_dict()
        value = math.nan
        if dist.get_rank() == 0:
            plain = {"augment": "none", "randaugment": None, "loader_processes": 0, "decoder": "cpu"}
            data = self.recipe.data.model_copy(update=plain)
            with torch.random.fork_rng(devices=[]):  # of the initial parameters, which are not used
                model = create_model(self.recipe.model, self._index.class_count, data.image_size)
            model.load_state_dict(state)
            device, size = self.engine.device, min(samples, self.batch.micro)
            loader = TrainLoader(data.shards, self._index, data, rank=0, ranks=1, batch_size=size, seed=0)
            normalise = Normalise(device, torch.float32)
            batches = [
                (normalise(batch.images), batch.labels)
                for batch in islice(loader.batches(device=device), max(1, samples // size))
            ]

            def loss(scores: Tensor, labels: Tensor) -> Tensor:
                self.engine.local_steps.liveness.moved()
                return F.cross_entropy(scores, labels)

            value = largest_eigenvalue(model.to(device).eval(), batches, loss)
        dist.barrier()
        return value

    @contextmanager
    def _reestimated(self) -> Iterator[None]:
        """Inside, batch norm has the statistics of the averaged parameters; they depend on the seed and the step only.

        Every rank must enter, on a boundary and after wait().
        """
        place = self.recipe.seed, self.engine.local_steps.step
        seed = seed_for("dropout of batch norm", *place, dist.get_rank())
        with reestimated_batch_norm(self.engine.module, self._statistics_batches(seed_for("batch norm", *place)), seed):
            yield

    def _statistics_batches(self, seed: int) -> Iterator[Tensor]:
        """Pictures of the training split for batch norm, augmented and not mixed; as many batches on every rank.

        Bad samples are counted against data.max_bad_samples for each estimation by itself.
        """
        options, ranks = self.recipe.batch_norm, dist.get_world_size()
        assert options is not None
        loader = TrainLoader(
            self.recipe.data.shards,
            self._index,
            self.recipe.data,
            rank=dist.get_rank(),
            ranks=ranks,
            batch_size=options.batch_size,
            seed=seed,
        )
        for batch in islice(loader.batches(device=self.engine.device), -(-options.batches // ranks)):
            self.engine.local_steps.liveness.moved()
            yield self.normalise(batch.images)

    def _evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of evaluation; a rank that has one fewer than others gets a picture that does not count at the end.

        Where the ranks of a worker hold the parameters together, every forward of one needs one of the others.
        """
        seen, device = 0, self.engine.device
        for images, labels, skipped in on_device(self.evaluation, device):
            _warn_of(skipped)
            seen += 1
            yield images, labels
        size = self.recipe.data.image_size
        for _ in range(seen, self.evaluation.most_batches):
            yield torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device), torch.tensor([-1], device=device)

    def _log(self, before: dict[str, Any], evaluated: dict[str, Any]) -> None:
        loss = torch.stack(self._losses).mean().item()  # waits for the device, so the times below are true
        self._losses.clear()
        state = self.engine.local_steps
        step, seconds, waited = self._logged
        figures = self._figures()
        self._logged = (state.step, self.clock.training(), self.clock.data)
        images = (state.step - max(step, self._started_at)) * self.batch.train
        elapsed = max(1e-9, self._logged[1] - seconds)
        self.monitor.log(
            Record(
                **before,
                **figures,
                **evaluated,
                step=state.step,
                loss=loss,
                images_per_second=images / elapsed,
                data_percent=100 * (self.clock.data - waited) / elapsed,
                skipped_samples=len(self.skipped_samples),
                relative_distance=state.relative_distance,
                skipped_steps=state.skipped_steps_of_all_workers,
                checkpoints_failed=self.checkpoints_failed,
                left_out=sum(state.left_out.values()),
            )
        )
        # Local steps may leave a worker out at the boundary, which may just have been; where gradients are averaged at
        # every step, and with "stop", nothing mends it.
        mended = state.qsr.faults.not_finite == "leave_out" and state.mode == "local"
        if not (math.isfinite(loss) or mended):
            raise DivergenceError(
                f"the loss is {loss} at step {state.step}; a lower qsr.lr.peak, a longer warm-up or "
                "optimizer.gradient_clipping helps against divergence"
            )

    @property
    def _images_seen(self) -> int:
        """Training samples that all ranks have seen, also other ranks before a resumption."""
        return self._images_before + (self.engine.local_steps.step - self._started_at) * self.batch.train

    def _seconds(self) -> tuple[float, float, float]:
        """Of training, of waiting for data, and of waiting for others at boundaries."""
        return self.clock.training(), self.clock.data, self.engine.local_steps.seconds_waiting

    def _log_workers(self) -> None:
        """Gather what every rank did since the last time; on a boundary, where they meet anyway."""
        state = self.engine.local_steps
        now = self._seconds()
        seconds, data, waiting = (value - before for value, before in zip(now, self._told, strict=True))
        self._told = now
        loss = torch.stack(self._round_losses).mean().item()
        self._round_losses.clear()
        mine = torch.tensor([loss, seconds, data, waiting, len(self.skipped_samples)], dtype=torch.float64)
        mine = mine.to(self.engine.device)
        told = torch.empty(dist.get_world_size() * len(mine), dtype=mine.dtype, device=mine.device)
        all_gather_flat(told, mine)
        ranks = told.cpu().view(-1, state.qsr.worker_size, len(mine))  # (worker, rank of the worker, figure)
        losses, passed, waited_for_data, waited, _ = ranks.mean(1).T.tolist()
        self.monitor.log_workers(
            WorkersRecord(
                step=state.step,
                seconds=passed,
                loss=losses,
                seconds_data=waited_for_data,
                seconds_waiting=waited if state.seconds_waiting else None,
                skipped_samples=[round(count) for count in ranks[:, :, -1].sum(1).tolist()],
            )
        )

    def _figures(self) -> dict[str, Any]:
        """What the run has cost so far."""
        state, training = self.engine.local_steps, self.clock.training()
        averaging = self.engine.seconds_averaging
        return {
            "images_seen": self._images_seen,
            "averagings": state.averagings,
            "bytes_sent": state.bytes_sent,
            "communication_percent": 100 * state.bytes_sent / max(1, state.parallel_bytes_so_far),
            "seconds_compute": training - self.clock.data - (averaging or 0.0),
            "seconds_averaging": averaging,
            "seconds_data": self.clock.data,
        }

    def summary(self) -> dict[str, Any]:
        state, training = self.engine.local_steps, self.clock.training()
        return {
            **self._figures(),
            "steps": state.step,
            "eval_accuracy": self.accuracy,
            "eval_loss": self.loss,
            "seconds_training": training,
            "images_per_second": self._images_seen / training,
            "checkpoints_failed": self.checkpoints_failed,
            "ranks": dist.get_world_size(),
            "worker_size": self.recipe.qsr.worker_size,
            "engine": self.recipe.engine,
            "device": self.engine.device.type,
            "torch": torch.__version__,
        }
