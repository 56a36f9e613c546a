"""The training loop of a recipe: what happens in a step, and when something else is due. It asks no engine its name.

    for every step      micro-batches: engine(images), engine.backward(loss), engine.step()
    at a boundary       evaluation on the averaged parameters, and a checkpoint, when one is due
    every few steps     a record to the monitor, on rank 0

Between boundaries nothing here crosses ranks.
"""

from __future__ import annotations

import math
import os
import warnings
from contextlib import nullcontext
from functools import partial
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from qsr_engine.config.batch import Batch, check_world_size
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import dump_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import Index
from qsr_engine.data.decoding import REGIONS
from qsr_engine.data.views import SMALL
from qsr_engine.membership.facts import check_agreement
from qsr_engine.membership.signals import StoppedError, stops_on_signals
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.run_folder import (
    check_run_folder,
    check_unfinished,
    leave_unfinished_run,
    lock_run_folder,
    open_run_folder,
)
from qsr_engine.training.batch_norm import has_batch_norm, of_averaged_model
from qsr_engine.training.batches import Batches
from qsr_engine.training.evaluation import Evaluation, ModelIsRead
from qsr_engine.training.figures import Clock, Figures
from qsr_engine.training.from_recipe import Engine, make_engine, share_cores
from qsr_engine.training.models import create_model
from qsr_engine.training.resuming import batch_for, check_same_recipe, load_newest
from qsr_engine.training.saving import Checkpoints, save_model


class DivergenceError(RuntimeError):
    """The loss is not finite: training on would burn hours for nothing."""


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
    lock = _claim_folder(recipe, resume=resume, writes=rank == 0)
    _warn_of_whole_decoding(recipe)
    share_cores()
    model, index = _make_model(recipe, index)
    engine = _start_engine(recipe, index, batch, model)
    torch.manual_seed(recipe.seed + 1 + rank)  # dropout differs between ranks
    client = load_newest(engine, recipe, str(index.digest())) if resume else {}
    step, watchdog = engine.local_steps.step, engine.local_steps.watchdog
    if rank == 0 and (step == 0 or not recipe.run_dir.exists()):
        lock = _open_folder(recipe, resume=resume)
    model_is_read: ModelIsRead = nullcontext
    if recipe.batch_norm is not None:
        model_is_read = partial(of_averaged_model, recipe, engine, index, watchdog.moved)
    engine.while_model_is_read(model_is_read)
    total_steps = recipe.qsr.total_steps
    assert total_steps is not None, "resolve_recipe() fills it in"
    with Monitor(
        recipe.run_dir, total_steps, tensorboard=recipe.logging.tensorboard, enabled=rank == 0, from_step=step
    ) as monitor:
        clock = Clock()
        run = _Run(
            recipe,
            engine,
            Batches(recipe, index, batch, engine.device, step=step, clock=clock),
            Evaluation(recipe, engine, index, batch.micro, watchdog.moved, model_is_read),
            Figures(engine, clock, monitor, batch.train),
            clock,
            accumulation=batch.accumulation,
            data=str(index.digest()),
        )
        run.load_state_dict(client)
        with stops_on_signals(engine.local_steps.request_stop), watchdog.explained():
            run.loop()
            summary = run.summary()
            averaged = engine.averaged_state_dict()
            if rank == 0:
                save_model(averaged, recipe)
                monitor.summary(**summary)
    if lock is not None:
        lock.close()
    watchdog.close()
    return summary


def _claim_folder(recipe: Recipe, *, resume: bool, writes: bool) -> IO[str] | None:
    """Check the run's folder before the ranks meet. Returns the lock of one that is there."""
    if resume:
        check_unfinished(recipe.run_dir)
        check_same_recipe(recipe)
        return lock_run_folder(recipe.run_dir) if writes and recipe.run_dir.exists() else None
    if writes:
        check_run_folder(recipe.run_dir)
    return None


def _open_folder(recipe: Recipe, *, resume: bool) -> IO[str] | None:
    """Begin the run's folder. Returns its lock."""
    if resume:
        leave_unfinished_run(recipe.run_dir)
    open_run_folder(recipe.run_dir, dump_recipe(recipe))
    return lock_run_folder(recipe.run_dir)


def _warn_of_whole_decoding(recipe: Recipe) -> None:
    if os.environ["RANK"] == "0" and not REGIONS and recipe.data.image_size > SMALL:
        warnings.warn(
            "qsr_engine was installed without a C compiler or libjpeg-turbo's headers, so JPEGs are decoded whole, "
            'which takes longer; see "Train a recipe" in the README',
            stacklevel=3,
        )


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


def _start_engine(recipe: Recipe, index: Index, batch: Batch, model: nn.Module) -> Engine:
    """The recipe's engine, in which all ranks have met and agreed on recipe and data."""
    engine = make_engine(recipe, batch, model)
    if recipe.data.decoder == "gpu" and engine.device.type != "cuda":
        raise ConfigError(f"data.decoder is 'gpu', and this rank trains on {engine.device.type}; write decoder: cpu")
    check_agreement({"recipe": _shared(recipe), "data": index.digest()}, engine.device)
    return engine


def _shared(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that must be the same on every rank; hosts may keep shards and runs in other places."""
    return recipe.model_dump(exclude={"data": {"shards", "cache_dir", "cache_gb"}, "logging": {"dir"}})


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
    """One run in progress.

    Args:
        accumulation: micro-batches in a step.
        data: digest of the data's index, which a checkpoint keeps.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        batches: Batches,
        evaluation: Evaluation,
        figures: Figures,
        clock: Clock,
        *,
        accumulation: int,
        data: str,
    ) -> None:
        self.recipe, self.engine = recipe, engine
        self.batches, self.evaluation, self.figures, self.clock = batches, evaluation, figures, clock
        self.checkpoints = Checkpoints(recipe, engine)
        self._accumulation, self._data = accumulation, data
        self._evaluated: dict[str, float] = {}  # by the last evaluation

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this rank beside the engine's own; the position in the data is the step."""
        parts = (self.clock, self.figures, self.batches, self.checkpoints)
        return {"data": self._data} | {key: value for part in parts for key, value in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict() gave; {} where a run begins."""
        if state:
            for part in (self.clock, self.figures, self.batches, self.checkpoints):
                part.load_state_dict(state)

    def loop(self) -> None:
        """Train to the end.

        Raises:
            DivergenceError: the loss is not finite, and nothing mends it.
            StoppedError, UnsavedError: the run was asked to stop.
        """
        state, logging = self.engine.local_steps, self.recipe.logging
        evaluation = _Due(logging.eval_every or state.qsr.total_steps, state.step)
        checkpoint = _Due(logging.checkpoint_every, state.step)
        workers = _Due(logging.every, state.step)
        while not state.finished:
            before: dict[str, Any] = {"round": state.round, "period": state.period, "lr": state.learning_rate}
            boundary = self._step()
            if boundary and (workers.now(state.step) or state.finished):
                self.figures.log_workers(len(self.batches.skipped))
            evaluated: dict[str, float] = {}
            if boundary and (evaluation.now(state.step) or state.finished):
                evaluated = self._evaluate()
            if evaluated or state.step % logging.every == 0:
                self._log(**before, **evaluated)
            if boundary and (checkpoint.now(state.step) or state.stopping) and not state.finished:
                with self.clock.paused():
                    self.checkpoints.save(self.state_dict())
            if state.stopping and not state.finished:
                raise StoppedError(
                    f"{self.recipe.run_dir}: the run was asked to stop, and has stopped after step {state.step} of "
                    f"{state.qsr.total_steps}, on a boundary; it goes on with `--resume`"
                )

    def _step(self) -> bool:
        """One optimizer step. Returns True at a boundary."""
        boundary = False
        for _ in range(self._accumulation):
            images, labels = self.batches.next()
            scores = self.engine(images)
            loss = F.cross_entropy(scores.float(), labels, label_smoothing=self.recipe.label_smoothing)
            self.engine.backward(loss)
            self.figures.add_loss(loss.detach())
            boundary = self.engine.step()
        return boundary

    def _evaluate(self) -> dict[str, float]:
        with self.clock.paused():
            self._evaluated = self.evaluation.run()
        return self._evaluated

    def _log(self, **known: Any) -> None:
        loss = self.figures.log(
            images_seen=self.batches.images_seen,
            skipped_samples=len(self.batches.skipped),
            checkpoints_failed=self.checkpoints.failed,
            **known,
        )
        state = self.engine.local_steps
        # Local steps may leave a worker out at the boundary, which may just have been; where gradients are averaged at
        # every step, and with "stop", nothing mends it.
        mended = state.qsr.faults.not_finite == "leave_out" and state.mode == "local"
        if not (math.isfinite(loss) or mended):
            raise DivergenceError(
                f"the loss is {loss} at step {state.step}; a lower qsr.lr.peak, a longer warm-up or "
                "optimizer.gradient_clipping helps against divergence"
            )

    def summary(self) -> dict[str, Any]:
        """The last figures of a run that is trained."""
        images_seen, training = self.batches.images_seen, self.clock.training()
        return {
            **self.figures.so_far(images_seen),
            "steps": self.engine.local_steps.step,
            "eval_accuracy": self._evaluated.get("eval_accuracy", math.nan),
            "eval_loss": self._evaluated.get("eval_loss", math.nan),
            "seconds_training": training,
            "images_per_second": images_seen / training,
            "checkpoints_failed": self.checkpoints.failed,
            "ranks": dist.get_world_size(),
            "worker_size": self.recipe.qsr.worker_size,
            "engine": self.recipe.engine,
            "device": self.engine.device.type,
            "torch": torch.__version__,
        }
