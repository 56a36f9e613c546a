"""Saving and resuming, as both engines do it.

    worker-00000/rank-00000.pt local steps, random states, the averager's and the scheduler's state, the caller's own
    worker-00000/...           what the engine itself writes for this worker (deepspeed/ or fsdp/)

A run with the same layout goes on bit for bit. One with another number of workers takes the parameters, which are the
same on every worker, and the mean of the workers' optimizer state, or none (`qsr.on_other_workers`). One whose layout
differs in more than the engine can convert takes the parameters only, and so does one of the other engine.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from qsr_engine.checkpoint.find import find
from qsr_engine.checkpoint.manifest import MODEL_FILE, CheckpointError, Manifest, plain
from qsr_engine.checkpoint.other_layout import check_same_model, differences, mean_of_states, policy, say
from qsr_engine.checkpoint.rank_file import (
    random_state,
    rank_file,
    read_rank,
    restore_random_state,
    worker_folder,
    write_rank,
)
from qsr_engine.checkpoint.together import Together
from qsr_engine.checkpoint.write import save
from qsr_engine.config.digest import flatten
from qsr_engine.engines.learning_rate import LearningRate
from qsr_engine.engines.replica import Masters
from qsr_engine.local_steps.steps import LocalSteps

log = logging.getLogger(__name__)

_RATES = ("lr", "initial_lr")  # of a parameter group


class Resumable(abc.ABC):
    """An engine that saves on boundaries and goes on from what it saved. The engine sets what is named here."""

    local_steps: LocalSteps
    module: nn.Module
    optimizer: Any
    device: torch.device
    lr_scheduler: Any
    global_steps: int
    global_samples: int
    micro_steps: int
    train_batch_size: Callable[[], int]
    gradient_accumulation_steps: Callable[[], int]
    # Entered on every rank while the averaged model is read, to change its buffers for so long (batch norm's).
    averaged_model: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    _masters: Masters
    _learning_rate: LearningRate
    _given_config: Mapping[str, Any]  # as initialize() got it, without the "qsr" block
    _own_folder: str  # inside a worker's folder, of the engine's own files
    _may_differ: frozenset[str] = frozenset({"workers"})  # of a layout, where the optimizer's state is converted

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
        keep: int | None = None,
    ) -> bool:
        """Save a checkpoint, one folder a worker, whole or not there; on a boundary only.

        Every rank must call it. Arguments as DeepSpeed's. client_state is kept for every rank: the position in the data
        belongs there. Random states, the local steps and the averaged model are saved too; the files are listed in
        the package checkpoint. With `keep`, the older whole ones in save_dir are deleted when this one is whole, so
        that so many are left.

        Raises:
            RuntimeError: inside a round, where every worker has parameters of its own, or inside gradient accumulation.
            CheckpointError: on every rank, if one could not write; what was saved before is as it was.
        """
        self._check_boundary("save")
        self._check_whole_step("save")
        self.local_steps.wait()
        client = client_state or {}
        if not isinstance(client, Mapping):
            raise CheckpointError(f"client_state is a {type(client).__name__}; give a dict")
        save(
            save_dir,
            str(tag or f"global_step{self.global_steps}"),
            lambda folder: self._write_checkpoint(folder, client, exclude_frozen_parameters),
            step=self.local_steps.step,
            layout=self._layout(),
            config={**self._given_config, "qsr": self.local_steps.qsr.model_dump()},
            latest=save_latest,
            folders=[str(worker_folder(Path(), worker) / self._own_folder) for worker in range(self._workers)],
            keep=keep,
        )
        return True

    def _check_boundary(self, what: str) -> None:
        if not self.local_steps.on_boundary:
            raise RuntimeError(
                f"step {self.local_steps.step} is inside a round of {self.local_steps.period} steps, where every "
                f"worker has parameters of its own; {what} when engine.step() has returned True"
            )

    def _check_whole_step(self, what: str) -> None:
        done = self.micro_steps % self.gradient_accumulation_steps()
        if done:
            raise RuntimeError(
                f"{done} of the {self.gradient_accumulation_steps()} micro-batches of step {self.local_steps.step} "
                f"have been seen, and no checkpoint has their gradients; {what} before the first or after the last one"
            )

    def _write_checkpoint(self, folder: Path, client_state: Mapping[str, Any], without_frozen: bool) -> None:
        """This rank's part of a checkpoint, in a folder that nobody else uses."""
        model = self.averaged_state_dict()
        self._write_worker(worker_folder(folder, self._worker), without_frozen)
        rank = dist.get_rank()
        if rank == 0:
            save_file(model, folder / MODEL_FILE, metadata={"format": "pt"})
        write_rank(
            rank_file(folder, self._worker, rank),
            {
                "local_steps": self.local_steps.state_dict(),
                "averager": self.local_steps.averager.state_dict(),
                "scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler is not None else None,
                "rates": [{key: group[key] for key in _RATES if key in group} for group in self._groups()],
                "random": random_state(self.device),
                "client": dict(client_state),
                "buffers": [buffer.detach().cpu() for buffer in self.module.buffers()],
                "without_frozen": without_frozen,
                "own": self._own_state(),
            },
        )

    def load_checkpoint(
        self, load_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Go on from what save_checkpoint() wrote: from the newest whole checkpoint, or from the one with a tag.

        Every rank must call it. Arguments as DeepSpeed's. With another number of workers the optimizer's state follows
        qsr.on_other_workers, and a warning says what was taken over. load_optimizer_states=False takes parameters, step
        and scheduler; load_module_only=True takes the parameters alone, also those of the other engine, and the run
        begins at step 0 with them.

        Returns:
            (path of the checkpoint's folder, the client_state that this rank gave; with other workers, that of rank 0).
        Raises:
            CheckpointError: on every rank, if there is no whole checkpoint, or it is of another model.
            RuntimeError: inside gradient accumulation; or load_module_only, and this run has begun.
        """
        self._check_whole_step("load")
        self.local_steps.averager.finish()
        names = ("tag", "load_module_strict", "load_optimizer_states", "load_lr_scheduler_states", "load_module_only")
        kwargs.update(zip(names, args, strict=False))
        tag, alone = kwargs.pop("tag", None), bool(kwargs.pop("load_module_only", False))
        if alone and self.local_steps.step:
            raise RuntimeError(
                f"load_module_only begins a run with the parameters of another, and this one is at step "
                f"{self.local_steps.step}; load them before its first step"
            )
        folder, manifest = find(load_dir, None if tag is None else str(tag))
        found = differences(manifest.layout, self._layout())
        check_same_model(folder, found)
        without_state = alone or not kwargs.get("load_optimizer_states", True)
        if not alone and "engine" not in found:
            self._say_what_differs(folder, manifest)
        together = Together(f"loading the checkpoint {folder}")
        with together.step():
            rank, worker = (0, 0) if found else (dist.get_rank(), self._worker)
            state = read_rank(rank_file(folder, worker, rank))
            if not without_state:
                self._check_workers(folder, manifest, found)
        together.agree()  # before the first collective, in which the others would wait for a rank that cannot read
        with together.step():
            if without_state:
                self._load_parameters(folder, 0 if alone else manifest.step)
            elif found:
                self._load_other_layout(folder, manifest, found, state)
            else:
                self._load_all(folder, state, kwargs)
            if alone:
                state["local_steps"] = self.local_steps.state_dict()
            elif self.lr_scheduler is not None and state["scheduler"] and kwargs.get("load_lr_scheduler_states", True):
                self.lr_scheduler.load_state_dict(state["scheduler"])
                for group, rates in zip(self._groups(), state["rates"], strict=False):
                    group.update(rates)  # which a scheduler keeps there, and goes on from
            self.local_steps.load_state_dict(state["local_steps"])
            self.local_steps.averager.restart()
            if not found and state["averager"]:
                self.local_steps.averager.load_state_dict(state["averager"])
            self.micro_steps = self.local_steps.step * self.gradient_accumulation_steps()
            self._learning_rate.set()
        together.agree()
        return str(folder), state["client"]

    def _say_what_differs(self, folder: Path, manifest: Manifest) -> None:
        """On rank 0: a run may go on with another configuration, but not in silence."""
        now = plain({**self._given_config, "qsr": self.local_steps.qsr.model_dump()})
        then, here = dict(flatten(manifest.config)), dict(flatten(now))
        found = [
            f"{key} was {then.get(key)!r} and is {here.get(key)!r}"
            for key in sorted({*then, *here})
            if then.get(key) != here.get(key)
        ]
        if found and dist.get_rank() == 0:
            log.warning("%s: the run goes on with another configuration: %s", folder, "; ".join(found))

    def _check_workers(self, folder: Path, manifest: Manifest, found: Mapping[str, tuple[Any, Any]]) -> None:
        """Whether the states of the workers that this rank will load can be read, in a run of this layout at all."""
        workers = [self._worker]
        if found:
            chosen = policy(folder, found, self.local_steps.qsr.on_other_workers, self._may_differ)
            workers = list(range(int(manifest.layout["workers"]))) if chosen == "mean" else []
        for worker in workers:
            self._check_worker(worker_folder(folder, worker))

    def _load_all(self, folder: Path, state: Mapping[str, Any], kwargs: dict[str, Any]) -> None:
        """Everything of a run with the same layout."""
        if state["without_frozen"]:
            kwargs["load_module_strict"] = False
        self._load_worker(folder, self._worker, state, **kwargs)
        if state["without_frozen"]:
            self._read_frozen(folder)
        self._put_buffers(state)
        restore_random_state(state["random"], self.device)

    @torch.no_grad()
    def _put_buffers(self, state: Mapping[str, Any]) -> None:
        for buffer, value in zip(self.module.buffers(), state["buffers"], strict=True):
            buffer.copy_(value)

    def _read_frozen(self, folder: Path) -> None:
        """What the engine's own files were told to leave out."""
        self._read_model(folder, {name for name, p in self.module.named_parameters() if not p.requires_grad})

    def _load_parameters(self, folder: Path, step: int) -> None:
        """The averaged model, whatever the layout; the optimizer is left as it is."""
        self._read_model(folder, None)
        self.global_steps = step
        self.global_samples = step * self.train_batch_size()

    def _load_other_layout(
        self, folder: Path, manifest: Manifest, found: Mapping[str, tuple[Any, Any]], state: Mapping[str, Any]
    ) -> None:
        """Parameters and step of a run with other workers, whose rank 0 had this state."""
        chosen = policy(folder, found, self.local_steps.qsr.on_other_workers, self._may_differ)
        say(folder, found, chosen)
        if chosen == "mean":
            workers = int(manifest.layout["workers"])
            mean_of_states(self._masters, lambda worker: self._load_worker(folder, worker, state), workers)
            self._put_buffers(state)
            if state["without_frozen"]:
                self._read_frozen(folder)
        else:
            self._load_parameters(folder, manifest.step)

    def averaged_state_dict(self) -> dict[str, Tensor]:
        """The averaged model: fp32 parameters and the buffers, on the CPU, under the names of the module's own.

        Every rank must call it, on a boundary. All of it is on rank 0; the others get an empty one.

        Raises:
            RuntimeError: inside a round.
        """
        self._check_boundary("ask for the averaged model")
        self.local_steps.wait()
        with self.averaged_model(), self.local_steps.buffers_averaged():
            if self._worker != 0:
                return {}
            return self._whole_model(keep=dist.get_rank() == 0)

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    # ------------------------------------------------------------------------------- what the engine provides

    @property
    @abc.abstractmethod
    def _worker(self) -> int:
        """Number of this rank's worker, as checkpoints count them; 0 under `parallel`."""

    @property
    @abc.abstractmethod
    def _workers(self) -> int:
        """Number of workers, as checkpoints count them; 1 under `parallel`."""

    @abc.abstractmethod
    def _layout(self) -> dict[str, Any]:
        """What must be the same for a run to go on bit for bit."""

    @abc.abstractmethod
    def _write_worker(self, folder: Path, without_frozen: bool) -> None:
        """Write parameters and optimizer state of this rank's worker under folder / _own_folder, which is there.

        One rank may fail, so none may wait for another that does not come.
        """

    @abc.abstractmethod
    def _check_worker(self, folder: Path) -> None:
        """Raises CheckpointError where _load_worker() could not read a worker's folder, or would run code of it."""

    @abc.abstractmethod
    def _load_worker(self, folder: Path, worker: int, state: Mapping[str, Any], **kwargs: Any) -> None:
        """Take over what _write_worker() wrote for a worker; `state` is what a rank of it wrote itself."""

    @abc.abstractmethod
    def _read_model(self, folder: Path, only: set[str] | None) -> None:
        """Put the averaged model of a checkpoint, or only these parameters, into the masters and the buffers."""

    @abc.abstractmethod
    def _whole_model(self, *, keep: bool) -> dict[str, Tensor]:
        """Parameters and buffers, as named_state() gives them; called on every rank of worker 0."""

    def _own_state(self) -> dict[str, Any]:
        """Plain values of this rank that the engine wants back in _load_worker()."""
        return {}
