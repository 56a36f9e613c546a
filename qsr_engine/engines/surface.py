"""What both engines show beside their framework's own surface; a training loop never asks which engine it has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qsr_engine.checkpoint.checkpointer import Checkpointer
from qsr_engine.engines.driver import Driver
from qsr_engine.local_steps.member import Loop, Standing
from qsr_engine.local_steps.steps import LocalSteps


class Surface:
    """Methods of an engine that has a driver and a checkpointer."""

    _driver: Driver
    _checkpointer: Checkpointer
    micro_steps: int
    global_steps: int
    gradient_accumulation_steps: Callable[[], int]
    train_micro_batch_size_per_gpu: Callable[[], int]
    _set_accumulation: Callable[[int], None]
    begin_at: Callable[[int], None]
    _go_on: Callable[[], None]

    @property
    def local_steps(self) -> LocalSteps:
        """Step, round, period and what averagings cost so far."""
        return self._driver.local_steps

    def join(self, loop: Loop | None = None) -> None:
        """Where workers come and go (`qsr.membership`), take part in the run: begin it with all others, or get at their
        next boundary what members hold, their step too. Elsewhere, and again, it is harmless.

        Call it after load_checkpoint(), and before the first batch is chosen; else the first forward in training does.

        Args:
            loop: what the loop adds to it, such as the number of samples seen.
        Raises:
            JoinError: the members run something else.
        """
        self._driver.join(loop)

    @property
    def standing(self) -> Standing:
        """Who is there since the last boundary, where workers come and go; elsewhere nobody else is."""
        member = self.local_steps.boundary.member
        return Standing() if member is None else member.standing

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """From the next optimizer step on, a step has so many samples over all ranks; micro-batches stay as large, and
        become more or fewer. As DeepSpeed's, and every rank must call it, between two steps.

        Of a member (`qsr.membership`) these are the ranks of its own worker, and members need not have as many.

        Raises:
            ValueError: they do not divide into whole micro-batches of all ranks.
            RuntimeError: inside gradient accumulation.
        """
        done = self._checkpointer.micro_batches_done()
        if done:
            raise RuntimeError(
                f"set_train_batch_size() after {done} of the {self.gradient_accumulation_steps()} micro-batches of "
                f"step {self.local_steps.step}; call it before the first or after the last one"
            )
        micro, ranks = self.train_micro_batch_size_per_gpu(), dist.get_world_size()
        accumulation, rest = divmod(train_batch_size, micro * ranks)
        if rest or accumulation < 1:
            below = accumulation * micro * ranks
            raise ValueError(
                f"train_batch_size {train_batch_size} does not divide into whole micro-batches of {micro} samples on "
                f"{ranks} ranks; write {f'{below} or ' if below else ''}{below + micro * ranks}"
            )
        self._set_accumulation(accumulation)
        self.micro_steps = self.global_steps * accumulation

    def _stand_at(self, step: int) -> None:
        """So many steps have been taken, by other members."""
        self.begin_at(step)
        self.micro_steps = step * self.gradient_accumulation_steps()
        self._go_on()

    @property
    def seconds_averaging(self) -> float | None:
        """Wall-clock seconds in averagings so far; None where it runs beside compute and cannot be told apart."""
        return self._driver.seconds_averaging

    def measure_next_step(self) -> None:
        """Ask for the norms at the next optimizer step, which measured() then tells. Every rank of a worker must.

        It reads parameters and optimizer state once. Nothing crosses workers.
        """
        self._driver.measure_next_step()

    def measured(self) -> dict[str, float]:
        """What the last optimizer step told of this worker; waits for the device.

        "loss_scale" where one is in use, as the step left it. After measure_next_step() also L2 norms: "gradient_norm",
        before clipping and without the loss scale, "parameter_norm" of the fp32 masters, and "exp_avg_norm",
        "exp_avg_sq_norm" and "momentum_buffer_norm" where the optimizer has such a state; all after the update and
        before an averaging.
        """
        return self._driver.measured()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model is the workers' average at this step, its buffers included; afterwards every worker has
        what it had, bit for bit, and training goes on as if nothing had been.

            with engine.averaged():
                evaluate(engine.module)

        Every rank must enter, after a step or before the first one. What each held is on the host meanwhile, so the
        average takes no room on the device. On a boundary only the buffers have to be averaged. Gradients are asked for
        by torch.autograd.grad() inside; a backward would add them to the worker's own, and is refused.

        Raises:
            BoundaryError: on every rank, if the ranks are not at the same step.
            CollectiveError: a collective failed; LostRankError, which is one, where ranks are lost.
        """
        with self._driver.averaged():
            yield

    def evaluate_the_average(self) -> None:
        """From now on `engine.eval()` enters averaged(), and `engine.train()`, or the next training forward, leaves it:
        for a loop of others whose evaluation is to see one model. Every rank must call eval() then."""
        self._driver.evaluate_the_average()

    def show_average(self, shown: bool) -> None:
        """What eval() and train() do with the parameters, for a model that is told so without its engine."""
        self._driver.begin_evaluation() if shown else self._driver.end_evaluation()

    def end_round(self) -> bool:
        """End the round here: the parameters are averaged now, and a new round begins. Every rank must call it.

        Returns:
            Whether there was a round to end; on a boundary there is none.
        Raises:
            BoundaryError, CollectiveError: as engine.step() at a boundary.
        """
        return self._driver.end_round()

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        keep: int | None = None,
    ) -> bool:
        """Save a checkpoint, one folder a worker, whole or not there; after any step, inside a round too.

        Every rank must call it. Arguments as DeepSpeed's. client_state is kept for every rank: the position in the data
        belongs there. Random states, the local steps and the averaged model are saved too; the files are listed in
        checkpoint/write.py. With `keep`, the older whole ones in save_dir are deleted when this one is whole, so that
        so many are left. With exclude_frozen_parameters none of its files has a frozen parameter; who loads it has them
        in the model already. The run goes on as if nothing had been saved.

        Raises:
            RuntimeError: inside gradient accumulation, or inside averaged().
            CheckpointError: on every rank, if one could not write; what was saved before is as it was.
        """
        frozen = not exclude_frozen_parameters
        with self.local_steps.watchdog.busy(), self._driver.own_parameters("save_checkpoint()"):
            self._checkpointer.save(save_dir, tag, client_state, latest=save_latest, keep=keep, frozen=frozen)
        return True

    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from what save_checkpoint() wrote: from the newest whole checkpoint, or from the one with a tag.

        Every rank must call it. Arguments as DeepSpeed's. With another number of workers the parameters are the average
        at that step, the optimizer's state follows qsr.on_other_workers, and a warning says what was taken over.
        mean_of_optimizer_states=True gives all workers the mean of their states, and the average, also where they are
        as many. load_optimizer_states=False takes averaged parameters, step and scheduler; load_module_only=True takes
        these parameters alone, also those of the other engine, and the run begins at step 0 with them.

        Returns:
            (path of the checkpoint's folder, the client_state that this rank gave; with other workers, that of rank 0).
        Raises:
            CheckpointError: on every rank, if there is no whole checkpoint, or it is of another model.
            RuntimeError: inside gradient accumulation; or load_module_only, and this run has begun.
        """
        with self.local_steps.watchdog.busy(), self._driver.own_parameters("load_checkpoint()"):
            return self._checkpointer.load(load_dir, *args, **kwargs)

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """The averaged model, on the CPU, under the names of the module's own state_dict(): what is trained in fp32,
        frozen parameters and buffers as they are.

        Every rank must call it, after any step. All of it is on rank 0; the others get an empty one.
        """
        with self.local_steps.watchdog.busy():
            return self._checkpointer.averaged_model()

    def while_model_is_read(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Enter a context on every rank whenever the averaged model is read, for a checkpoint or by
        averaged_state_dict(): one that changes its buffers for so long (batch norm's statistics)."""
        self._checkpointer.while_model_is_read(context)
