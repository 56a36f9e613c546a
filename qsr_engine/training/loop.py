"""The training loop of a recipe: what happens in a step, and when something else is due. It asks no engine its name.

    for every step      micro-batches: engine(inputs), engine.backward(loss), engine.step()
    every few steps     evaluation of the workers' average, and before training; a record to the monitor, on rank 0,
                        with norms inside its worker; a checkpoint
    at a boundary       what the workers tell of themselves, every few steps

Between boundaries nothing else here crosses ranks.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import nn

from qsr_engine.checkpoint.find import any_here
from qsr_engine.config.batch import Batch, check_world_size
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import dump_recipe, load_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import Index
from qsr_engine.membership.facts import check_agreement
from qsr_engine.membership.roll_call import told_to_all
from qsr_engine.membership.signals import StoppedError, stops_on_signals
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.run_folder import (
    CHECKPOINTS,
    ORIGIN,
    RECIPE,
    SUMMARY,
    check_run_folder,
    check_unfinished,
    leave_unfinished_run,
    lock_run_folder,
    open_run_folder,
    write_whole,
)
from qsr_engine.records.tensorboard import About
from qsr_engine.training.batch_norm import has_batch_norm, of_averaged_model
from qsr_engine.training.batches import Batches
from qsr_engine.training.branching import Origin, begin_from, changes_since, origin_text, read_origin
from qsr_engine.training.evaluation import Evaluation, ModelIsRead
from qsr_engine.training.figures import Clock, Figures, predicted
from qsr_engine.training.from_recipe import Engine, autocast, make_engine, share_cores
from qsr_engine.training.make_task import make_task
from qsr_engine.training.resuming import batch_for, check_same_recipe, load_newest
from qsr_engine.training.saving import Checkpoints, save_model
from qsr_engine.training.task import Task


class DivergenceError(RuntimeError):
    """The loss is not finite: training on would burn hours for nothing."""


def train(recipe: Recipe, index: Index, *, resume: bool = False, origin: Origin | None = None) -> dict[str, Any]:
    """Train a resolved recipe in this process, one rank of those that a launcher started.

    Args:
        recipe: as resolve_recipe() gives it.
        index: of recipe.data.shards, whose shards have been checked.
        resume: go on from the newest whole checkpoint in the run's folder, or begin where there is none.
        origin: the checkpoint of another run to begin with; None: begin at step 0, or where the folder says.
    Returns:
        The final figures, as in the run's `summary.json`.
    Raises:
        ConfigError, AgreementError, BoundaryError, CheckpointError, CollectiveError, DataError, DivergenceError,
            HostError: the message is for the user.
        StoppedError: the run was asked to stop, and did so.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with told_to_all():
        check_world_size(ranks, recipe.qsr.worker_size)
        batch = batch_for(recipe, ranks, resume=resume)
        lock = _claim_folder(recipe, resume=resume, writes=rank == 0)
        if resume:  # a run that died before its first checkpoint begins as it had begun
            origin = None if any_here(recipe.run_dir / CHECKPOINTS) else origin or read_origin(recipe.run_dir)
        share_cores()
        task = make_task(recipe, index)
        index, model = task.index, make_model(recipe, task)
        changed = changes_since(origin, recipe, model) if origin else {}
    engine = _start_engine(recipe, index, batch, model, origin)
    torch.manual_seed(recipe.seed + 1 + rank)  # dropout differs between ranks
    client = load_newest(engine, recipe, str(index.digest())) if resume else None
    begins = client is None
    if client is None:
        client = begin_from(engine, recipe, origin, changed, str(index.digest())) if origin else {}
    step, watchdog = engine.local_steps.step, engine.local_steps.watchdog
    batches = Batches(recipe, task, batch, engine.device, step=step, clock=Clock())
    if rank == 0 and (begins or not recipe.run_dir.exists()):
        lock = _open_folder(recipe, origin, resume=resume)
    elif rank == 0:
        (recipe.run_dir / SUMMARY).unlink(missing_ok=True)  # of where it had stopped
        _keep_stop(recipe)
    with Monitor(
        recipe.run_dir,
        recipe.last_step,
        tensorboard=recipe.logging.tensorboard,
        services=recipe.logging.services,
        enabled=rank == 0,
        from_step=step,
        origin=asdict(origin) if origin and begins else None,
        about=about(recipe, engine) if rank == 0 else None,
    ) as monitor:
        run = make_run(recipe, engine, task, batch, batches, monitor, begins=begins)
        run.load_state_dict(client)
        with stops_on_signals(engine.local_steps.request_stop), watchdog.explained():
            run.loop()
            summary = run.summary()
            averaged = engine.averaged_state_dict()
            if rank == 0:
                save_model(averaged, recipe, task.files(engine.module))
                monitor.summary(**summary)
    if lock is not None:
        lock.close()
    watchdog.close()
    return summary


def _claim_folder(recipe: Recipe, *, resume: bool, writes: bool) -> IO[str] | None:
    """Check the run's folder before the ranks meet. Returns the lock of one that is there."""
    if resume:
        check_unfinished(recipe.run_dir, recipe.last_step)
        check_same_recipe(recipe)
        return lock_run_folder(recipe.run_dir) if writes and recipe.run_dir.exists() else None
    if writes:
        check_run_folder(recipe.run_dir)
    return None


def _open_folder(recipe: Recipe, origin: Origin | None, *, resume: bool) -> IO[str] | None:
    """Begin the run's folder. Returns its lock."""
    if resume:
        leave_unfinished_run(recipe.run_dir)
    open_run_folder(recipe.run_dir, dump_recipe(recipe))
    if origin is not None:
        write_whole(recipe.run_dir / ORIGIN, origin_text(origin))
    return lock_run_folder(recipe.run_dir)


def _keep_stop(recipe: Recipe) -> None:
    """Write where a run that goes on stops now into the recipe of its folder, which is as it was begun otherwise."""
    path = recipe.run_dir / RECIPE
    begun = load_recipe(path)
    if begun.stop_at_step != recipe.stop_at_step:
        write_whole(path, dump_recipe(begun.model_copy(update={"stop_at_step": recipe.stop_at_step})))


def make_model(recipe: Recipe, task: Task) -> nn.Module:
    """The recipe's model for the data of its task, the same on every rank."""
    torch.manual_seed(recipe.seed)
    model = task.create_model()
    if recipe.batch_norm is not None and not has_batch_norm(model):
        raise ConfigError(f"batch_norm is given, and {recipe.model.name} has no batch norm; leave it out")
    return model


def _start_engine(recipe: Recipe, index: Index, batch: Batch, model: nn.Module, origin: Origin | None) -> Engine:
    """The recipe's engine, in which all ranks have met and agreed on recipe, data and what the run begins with."""
    engine = make_engine(recipe, batch, model)
    facts = {"recipe": shared(recipe), "data": index.digest(), "from": origin and origin.agreed}
    check_agreement(facts, engine.device)
    return engine


def make_run(
    recipe: Recipe,
    engine: Engine,
    task: Task,
    batch: Batch,
    batches: Batches,
    monitor: Any,
    *,
    begins: bool,
    kind: type[_Run] | None = None,
) -> _Run:
    """The run from the engine's step on.

    Args:
        monitor: a Monitor, or what can do the same.
    """
    state, clock = engine.local_steps, batches.clock
    model_is_read: ModelIsRead = nullcontext
    if recipe.batch_norm is not None:
        model_is_read = partial(of_averaged_model, recipe, engine, task.index, state.watchdog.moved)
    engine.while_model_is_read(model_is_read)
    return (kind or _Run)(
        recipe,
        engine,
        task,
        batches,
        Evaluation(recipe, engine, task, batch.micro, state.watchdog.moved, model_is_read),
        Figures(engine, clock, monitor, batch.train, unit=task.unit, units=task.units),
        clock,
        monitor,
        accumulation=batch.accumulation,
        data=str(task.index.digest()),
        begins=begins,
    )


def about(recipe: Recipe, engine: Engine) -> About:
    points = predicted(engine.local_steps.qsr)
    return About(recipe.model_dump(mode="json", exclude_none=True), dump_recipe(recipe), points)


def shared(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that must be the same on every rank; hosts may keep shards and runs in other places."""
    return recipe.model_dump(exclude={"data": {"shards", "cache_dir", "cache_gb"}, "logging": {"dir"}})


class _Run:
    """One run in progress.

    Args:
        accumulation: micro-batches in a step.
        data: digest of the data's index, which a checkpoint keeps.
        begins: whether it has no checkpoint of its own yet to go on from.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        task: Task,
        batches: Batches,
        evaluation: Evaluation,
        figures: Figures,
        clock: Clock,
        monitor: Any,
        *,
        accumulation: int,
        data: str,
        begins: bool,
    ) -> None:
        self.recipe, self.engine, self.task = recipe, engine, task
        self.batches, self.evaluation, self.figures, self.clock = batches, evaluation, figures, clock
        self.checkpoints = Checkpoints(recipe, engine)
        self._monitor, self._accumulation, self._data = monitor, accumulation, data
        self._parts = (clock, figures, batches, self.checkpoints, evaluation)
        self._begins = begins
        self._evaluated: dict[str, Any] = {}  # by the last evaluation

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this rank beside the engine's own; the position in the data is the step."""
        return {"data": self._data} | {key: value for part in self._parts for key, value in part.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict() gave; {} where there is none."""
        for part in self._parts if state else ():
            part.load_state_dict(state)

    def loop(self) -> None:
        """Train to the end, or to where the recipe stops, with a checkpoint there.

        That may be inside a round: the evaluation and the model are then those of the workers' average, and the
        checkpoint has what every worker holds, so that a run which goes on does not know that it had stopped.

        Raises:
            DivergenceError: the loss is not finite, and nothing mends it.
            StoppedError, UnsavedError: the run was asked to stop.
        """
        state, logging, last_step = self.engine.local_steps, self.recipe.logging, self.recipe.last_step
        if state.step >= last_step:  # it stopped there, and died before it could say so
            self._evaluate()
        if logging.eval_first and self._begins:
            self._log(round=state.round, period=state.period, lr=state.learning_rate, **self._evaluate())
        while state.step < last_step:
            before: dict[str, Any] = {"round": state.round, "period": state.period, "lr": state.learning_rate}
            if logging.norms and self._will_log(state.step + 1):
                self.engine.measure_next_step()
            boundary = self._step()
            ended = state.step >= last_step
            if ended:
                state.watchdog.done(state.step, state.round, finished=True)
            due = self.figures.workers_are_due(logging.every)
            if boundary and (due or ended):
                self.figures.log_workers(len(self.batches.skipped), due=due)
            evaluated: dict[str, Any] = {}
            if ended or self._is_due(logging.eval_every, boundary=boundary):
                evaluated = self._evaluate()
            if self._will_log(state.step):
                self._log(**before, **evaluated)
            why = "the run was asked to stop" if state.stopping else None
            if ended:
                why = f"the run stops at step {last_step} (stop_at_step)"
            if not state.finished and (why or self._is_due(logging.checkpoint_every, boundary=boundary)):
                self._save(why)
            if ended:
                return
            if state.stopping:
                raise StoppedError(f"{self.recipe.run_dir}: {self._stopped()}")

    def _stopped(self) -> str:
        """What is said of a run that has been stopped."""
        state = self.engine.local_steps
        at = f"after step {state.step} of {state.qsr.total_steps}"
        return f"the run was asked to stop, and has stopped {at}; it goes on with `--resume`"

    def _save(self, why: str | None) -> None:
        """Write a checkpoint; `why` the run ends with it, if it does."""
        with self.clock.paused(), self._monitor.phase("saving", self.engine.local_steps.step):
            self.checkpoints.save(self.state_dict(), stopping=why)

    def _is_due(self, every: int | None, *, boundary: bool) -> bool:
        """Whether that which comes every so many steps comes after the step that was taken last."""
        return _is_due(every, self.engine.local_steps.step)

    def _will_log(self, step: int) -> bool:
        """Whether there is a record of a step: every evaluation has one, and a run ends with one."""
        logging = self.recipe.logging
        return step == self.recipe.last_step or _is_due(logging.every, step) or _is_due(logging.eval_every, step)

    def _step(self) -> bool:
        """One optimizer step. Returns True at a boundary."""
        boundary, count = False, self._accumulation  # which a boundary may change
        for number in range(1, count + 1):
            inputs, targets = self.batches.next()
            with autocast(self.recipe, self.engine.device):
                outputs = self.engine(inputs)
            loss = self.task.loss(outputs, targets)
            self.engine.backward(loss)
            self.figures.add(loss, self.task.accuracy(outputs, targets), last=number == count)
            boundary = self.engine.step()
        return boundary

    def _evaluate(self) -> dict[str, Any]:
        with self.clock.paused(), self._monitor.phase("evaluating", self.engine.local_steps.step):
            self._evaluated = self.evaluation.run()
        return self._evaluated

    def _log(self, **known: Any) -> None:
        loss = self.figures.log(
            samples_seen=self.batches.samples_seen,
            skipped_samples=len(self.batches.skipped),
            checkpoints_failed=self.checkpoints.failed,
            **known,
        )
        state = self.engine.local_steps
        # Local steps may leave a worker out at the boundary, which may just have been; where gradients are averaged at
        # every step, and with "stop", nothing mends it.
        mended = state.qsr.faults.not_finite == "leave_out" and state.mode == "local"
        if not (loss is None or math.isfinite(loss) or mended):
            raise DivergenceError(
                f"the loss is {loss} at step {state.step}; a lower qsr.lr.peak, a longer warm-up or "
                "optimizer.gradient_clipping helps against divergence"
            )

    def summary(self) -> dict[str, Any]:
        """The last figures of a run that is trained."""
        samples_seen, training = self.batches.samples_seen, self.clock.training()
        return {
            **self.figures.so_far(samples_seen),
            "steps": self.engine.local_steps.step,
            "partial": not self.engine.local_steps.finished,
            **{name: self._evaluated.get(name) for name in self.task.reached},
            "train_accuracy": self.figures.train_accuracy,
            "seconds_training": training,
            f"{self.task.unit}_per_second": self.task.units * samples_seen / training,
            "checkpoints_failed": self.checkpoints.failed,
            "ranks": dist.get_world_size(),
            "worker_size": self.recipe.qsr.worker_size,
            "engine": self.recipe.engine,
            "device": self.engine.device.type,
            "torch": torch.__version__,
        }


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
