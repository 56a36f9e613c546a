"""Training a recipe as one of several workers that come and go: training.loop, with what attendance.py adds."""

from __future__ import annotations

import os
from contextlib import closing, suppress
from typing import IO, Any

import torch.distributed as dist

from qsr_engine.checkpoint.find import find_alone
from qsr_engine.checkpoint.manifest import CheckpointError
from qsr_engine.config.digest import digest
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import dump_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import Index
from qsr_engine.engines.surface import Surface
from qsr_engine.local_steps.member import MemberBoundary
from qsr_engine.membership.roll_call import told_to_all
from qsr_engine.membership.signals import stops_on_signals
from qsr_engine.records.monitor import Monitor
from qsr_engine.records.run_folder import (
    CHECKPOINTS,
    SUMMARY,
    is_finished,
    leave_unfinished_run,
    lock_run_folder,
    open_run_folder,
)
from qsr_engine.training.attendance import Attendance, Records, batch_of_worker
from qsr_engine.training.batches import Batches
from qsr_engine.training.figures import Clock
from qsr_engine.training.from_recipe import make_engine, share_cores
from qsr_engine.training.loop import _Run, about, make_model, make_run, shared
from qsr_engine.training.make_task import make_task
from qsr_engine.training.resuming import check_same_recipe, load_newest
from qsr_engine.training.saving import save_model


def train_as_member(recipe: Recipe, index: Index, *, resume: bool = False) -> dict[str, Any] | None:
    """Train a resolved recipe in this process, one rank of a worker that a launcher has started, with other workers.

    Args:
        index: of recipe.data.shards, whose shards have been checked.
        resume: where no members are there, go on from the newest whole checkpoint in the run's folder.
    Returns:
        The final figures on the worker that records the run; None on the others.
    Raises:
        as training.loop.train(); and JoinError.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with told_to_all():
        batch, dealing = batch_of_worker(recipe, ranks, resume=resume)
        check_same_recipe(recipe)
        share_cores()
        task = make_task(recipe, index)
        index, model = task.index, make_model(recipe, task)
    engine = make_engine(recipe, batch, model)
    assert isinstance(engine, Surface)
    client = load_newest(engine, recipe, str(index.digest())) if resume else None
    state = engine.local_steps
    member = state.boundary.member
    assert member is not None
    batches = Batches(recipe, task, batch, engine.device, step=state.step, clock=Clock())
    batches.load_state_dict(client or {})
    told = {"recipe": digest(shared(recipe)), "data": index.digest()}
    samples = index.split(recipe.data.train).samples
    attendance = Attendance(recipe, told, batches, dealing, engine, samples)
    attendance.load_state_dict(client or {})

    def begin(step: int) -> IO[str] | None:
        """The run's folder, which is there where another member has recorded in it, and the lock that this one had."""
        if step == 0:
            if resume:
                leave_unfinished_run(recipe.run_dir)
            open_run_folder(recipe.run_dir, dump_recipe(recipe))
        (recipe.run_dir / SUMMARY).unlink(missing_ok=True)
        try:
            return lock_run_folder(recipe.run_dir)
        except ConfigError:  # it is frozen, and others go on without it
            return None

    def monitor(step: int) -> Monitor:
        return Monitor(
            recipe.run_dir,
            recipe.last_step,
            tensorboard=recipe.logging.tensorboard,
            services=recipe.logging.services,
            from_step=step,
            about=about(recipe, engine),
        )

    with state.watchdog.explained():
        engine.join(attendance)
    if member.begun and is_finished(recipe.run_dir, recipe.last_step):  # it was started again when all was done
        member.members.close()
        return None
    records = Records(recipe, begin, monitor, member.members.has_left, member.members.name, writes=rank == 0)
    with closing(member.members), stops_on_signals(state.request_stop), state.watchdog.explained(), closing(records):
        begins = state.step == 0
        run = make_run(recipe, engine, task, batch, batches, records, begins=begins, kind=_MemberRun)
        assert isinstance(run, _MemberRun)
        run.attend(member, attendance, records, client or {})
        summary = None
        with suppress(_OverError):
            run.loop()
            summary = run.finish(rank)
    state.watchdog.close()
    return summary


class _OverError(Exception):
    """The others have ended the run, in which this worker was late or frozen: there is nothing left to do."""


class _MemberRun(_Run):
    """A run in progress on one of several workers."""

    def attend(self, member: MemberBoundary, attendance: Attendance, records: Records, client: dict[str, Any]) -> None:
        """Take part, after join()."""
        self._member, self._attendance, self._records = member, attendance, records
        self._boundary_before = self._last_boundary = self.engine.local_steps.step
        samples_seen = self.batches.samples_seen
        self.load_state_dict(client)
        self.batches.samples_seen = samples_seen  # by all members, as those told whom this worker has joined
        self.figures.begin_at(samples_seen)
        self._stand()

    def _stand(self) -> None:
        step, member = self.engine.local_steps.step, self._member
        events = self._attendance.stand(member.standing, step, dist.get_rank())
        self._accumulation = self._attendance.accumulation
        self._records.stand(member.standing, step, self._boundary_before, [*member.events, *events])
        member.events = []

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | self._attendance.state_dict()

    def summary(self) -> dict[str, Any]:
        return super().summary() | self._attendance.counts

    def _step(self) -> bool:
        boundary = super()._step()
        if boundary:
            if is_finished(self.recipe.run_dir, self.recipe.last_step):
                raise _OverError
            self._boundary_before, self._last_boundary = self._last_boundary, self.engine.local_steps.step
            self._stand()
        return boundary

    def _is_due(self, every: int | None, *, boundary: bool) -> bool:
        """At the first boundary from there on, where all members hold the same."""
        return boundary and every is not None and self._last_boundary // every > self._boundary_before // every

    def _evaluate(self) -> dict[str, Any]:
        return super()._evaluate() if self._member.standing.recorder else {}

    def _save(self, why: str | None) -> None:
        """The recorder saves. Where the one before it has saved in this round, it was asked to stop there, and this
        worker too; then that checkpoint is the run's."""
        if self._member.standing.recorder and not (why and self._member.members.agree(self._was_saved_in_this_round())):
            super()._save(why)

    def _was_saved_in_this_round(self) -> bool:
        """In the one that has just ended: members save on boundaries otherwise."""
        step = self.engine.local_steps.step
        if step != self._last_boundary:
            return False
        try:
            saved = find_alone(self.recipe.run_dir / CHECKPOINTS)[1].step
        except CheckpointError:
            return False
        return self._boundary_before < saved <= step

    def _stopped(self) -> str:
        state = self.engine.local_steps
        at = f"after step {state.step} of {state.qsr.total_steps}"
        return f"this worker was asked to stop, and has left {at}; where all have, the run goes on with `--resume`"

    def finish(self, rank: int) -> dict[str, Any] | None:
        """The model and the summary, on the recorder."""
        if not self._member.standing.recorder:
            return None
        summary, averaged = self.summary(), self.engine.averaged_state_dict()
        if rank == 0:
            save_model(averaged, self.recipe, self.task.files(self.engine.module))
            self._records.summary(**summary)
        return summary
