"""Saving a run and going on from it, as both engines do it: a checkpointer is given what has a `state_dict()`.

    worker-00000/rank-00000.pt local steps, random states, the averager's and the scheduler's state, the caller's own
    worker-00000/...           what the engine itself writes for this worker (deepspeed/ or fsdp/)

A run with the same layout goes on bit for bit, inside a round too. One with another number of workers takes the average
of the workers' parameters, and the mean of their optimizer state, or none (`qsr.on_other_workers`). One whose layout
differs in more than the engine can convert takes the parameters only, and so does one of the other engine. Whoever
takes the average begins a round with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from qsr_engine.checkpoint.buffers import kept_buffers, make_room, put_buffers
from qsr_engine.checkpoint.extra_state import extra_states, put_extra_states
from qsr_engine.checkpoint.find import find
from qsr_engine.checkpoint.group_options import RATES, changed, follow, options_of
from qsr_engine.checkpoint.manifest import MODEL_FILE, CheckpointError, Manifest, plain
from qsr_engine.checkpoint.other_layout import (
    Found,
    check_same_model,
    found_in,
    mean_of_states,
    optimizer_state_from,
    to_load,
    warn_of_average,
    warn_of_other_configuration,
    warn_of_other_layout,
    warn_of_other_options,
)
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
from qsr_engine.local_steps.averaged import Averaged
from qsr_engine.local_steps.steps import LocalSteps, from_the_average

_LOAD_OPTIONS = ("tag", "load_module_strict", "load_optimizer_states", "load_lr_scheduler_states", "load_module_only")


class WorkerFiles(Protocol):
    """An engine's own files of one worker: parameters and optimizer state. The engine counts its steps in them too."""

    folder: str  # inside a worker's folder
    may_differ: frozenset[str]  # of a layout, where the optimizer's state is converted

    def write(self, folder: Path, *, without_frozen: bool) -> None:
        """Write this rank's part under a worker's folder, whose own folder is there.

        One rank may fail, so none may wait for another that does not come.
        """

    def check(self, folder: Path) -> None:
        """Raises CheckpointError where load() could not read a worker's folder, or would run code of it."""

    def load(self, folder: Path, own: Mapping[str, Any], **options: Any) -> None:
        """Take over what write() wrote for a worker; `own` is what a rank of it gave as state_dict()."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values of this rank that load() wants back."""

    def model(self, *, keep: bool, frozen: bool) -> dict[str, Tensor]:
        """Parameters and buffers, as model_file.named_state() gives them; called on every rank of worker 0."""

    def read_model(self, folder: Path) -> None:
        """Put the averaged model of a checkpoint into the masters and the buffers."""


class Engine(Protocol):
    """What a checkpointer reads of an engine. A step has several micro-batches under gradient accumulation."""

    module: nn.Module
    optimizer: Any  # has param_groups
    lr_scheduler: Any  # None where there is none
    device: torch.device
    global_steps: int
    micro_steps: int

    @property
    def micro_batches_seen(self) -> int:
        """Of the step under way: those whose gradients are there."""

    def gradient_accumulation_steps(self) -> int: ...

    def begin_at(self, step: int) -> None:
        """So many steps have been taken, and the samples of each."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Whose checkpoint it is.

    Args:
        layout: what must be the same for a run to go on bit for bit.
        config: as the user gave it, with its "qsr" block resolved.
        worker, workers: number of this rank's worker, and how many there are; 0 of 1 under `parallel`.
    """

    layout: dict[str, Any]
    config: dict[str, Any]
    worker: int
    workers: int


class Checkpointer:
    """Saves one engine's run after any step, and goes on from what it saved.

    Args:
        averaged: inside it the model is the workers' average.
        loaded: called when everything is loaded.
    """

    def __init__(
        self,
        identity: Identity,
        engine: Engine,
        replica: Averaged,
        files: WorkerFiles,
        local_steps: LocalSteps,
        *,
        averaged: Callable[[], contextlib.AbstractContextManager[None]],
        loaded: Callable[[], None],
    ) -> None:
        self._identity, self._engine, self._replica = identity, engine, replica
        self._files, self._local_steps, self._averaged, self._loaded = files, local_steps, averaged, loaded
        self._options = options_of(engine.optimizer.param_groups)  # as configured
        self._model_is_read: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def while_model_is_read(self, context: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """Enter this on every rank while the averaged model is read, to change its buffers for so long."""
        self._model_is_read = context

    # ---------------------------------------------------------------------------------------------------- save

    def save(
        self, directory: str | os.PathLike[str], tag: Any, client: Any, *, latest: bool, keep: int | None, frozen: bool
    ) -> None:
        """As engines.surface says of save_checkpoint(); not `frozen`: leave out parameters that are not trained."""
        self._check_whole_step("save")
        self._local_steps.boundary.meet()  # a rank that saves alone is told so, where the others come next
        client = client or {}
        if not isinstance(client, Mapping):
            raise CheckpointError(f"client_state is a {type(client).__name__}; give a dict")
        workers = range(self._identity.workers)
        save(
            directory,
            str(tag or f"global_step{self._engine.global_steps}"),
            lambda folder: self.write(folder, client, without_frozen=not frozen),
            step=self._local_steps.step,
            inside_round=not self._local_steps.boundary.same_everywhere,
            layout=self._identity.layout,
            config=self._identity.config,
            latest=latest,
            folders=[str(worker_folder(Path(), worker) / self._files.folder) for worker in workers],
            keep=keep,
        )

    def micro_batches_done(self) -> int:
        """Of the step under way."""
        return min(self._engine.micro_batches_seen, self._engine.gradient_accumulation_steps())

    def _check_whole_step(self, what: str) -> None:
        done = self.micro_batches_done()
        if done:
            accumulation = self._engine.gradient_accumulation_steps()
            raise RuntimeError(
                f"{done} of the {accumulation} micro-batches of step {self._local_steps.step} "
                f"have been seen, and no checkpoint has their gradients; {what} before the first or after the last one"
            )

    def write(self, folder: Path, client: Mapping[str, Any], *, without_frozen: bool) -> None:
        """This rank's part of a checkpoint, in a folder that nobody else uses."""
        extra = extra_states(self._engine.module)
        model, worker, rank = self.averaged_model(frozen=not without_frozen), self._identity.worker, dist.get_rank()
        scheduler, groups = self._engine.lr_scheduler, self._engine.optimizer.param_groups
        self._files.write(worker_folder(folder, worker), without_frozen=without_frozen)
        if rank == 0:
            save_file(model, folder / MODEL_FILE, metadata={"format": "pt"})
        write_rank(
            rank_file(folder, worker, rank),
            {
                "local_steps": self._local_steps.state_dict(),
                "averager": self._local_steps.averager_state(),
                "scheduler": scheduler.state_dict() if scheduler is not None else None,
                "rates": [{key: group[key] for key in RATES if key in group} for group in groups],
                "options": self._options,
                "extra": extra,
                "random": random_state(self._engine.device),
                "client": dict(client),
                "buffers": kept_buffers(self._engine.module),
                "without_frozen": without_frozen,
                "own": self._files.state_dict(),
            },
        )

    def averaged_model(self, *, frozen: bool = True) -> dict[str, Tensor]:
        """As engines.surface says of averaged_state_dict(); not `frozen`: without parameters that are not trained."""
        with self._averaged(), self._model_is_read():
            if self._identity.worker != 0:
                return {}
            return self._files.model(keep=dist.get_rank() == 0, frozen=frozen)

    # ---------------------------------------------------------------------------------------------------- load

    def load(
        self, directory: str | os.PathLike[str], *args: Any, **options: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """As engines.surface says of load_checkpoint()."""
        self._check_whole_step("load")
        self._local_steps.averager.finish()
        options.update(zip(_LOAD_OPTIONS, args, strict=False))
        tag, module_only = options.pop("tag", None), bool(options.pop("load_module_only", False))
        mean = bool(options.pop("mean_of_optimizer_states", False))
        if module_only and self._local_steps.step:
            raise RuntimeError(
                f"load_module_only begins a run with the parameters of another, and this one is at step "
                f"{self._local_steps.step}; load them before its first step"
            )
        folder, manifest = find(directory, None if tag is None else str(tag))
        found = found_in(manifest.layout, self._identity.layout)
        check_same_model(folder, found)
        without_state = module_only or not options.get("load_optimizer_states", True)
        if not module_only and "engine" not in found:
            warn_of_other_configuration(folder, manifest.config, plain(self._identity.config))
        other = bool(found) or mean  # than what each worker has saved
        if manifest.inside_round and (other or without_state):
            warn_of_average(folder, manifest.step)
        together = Together(f"loading the checkpoint {folder}")
        with together.step():
            rank, worker = (0, 0) if other else (dist.get_rank(), self._identity.worker)
            state = read_rank(rank_file(folder, worker, rank))
            source = self._source(folder, found, mean=mean) if other and not without_state else "own"
            if not without_state:
                self._check_workers(folder, manifest, source)
        together.agree()  # before the first collective, in which the others would wait for a rank that cannot read
        with together.step():
            make_room(self._engine.module, state["buffers"], self._engine.device)
            if without_state:
                self._load_parameters(folder, 0 if module_only else manifest.step)
            elif other:
                self._load_other_layout(folder, manifest, found, state, source)
            else:
                self._load_same_layout(folder, state, options)
            put_extra_states(self._engine.module, state.get("extra", {}))
            if not without_state:
                self._follow_options(folder, state.get("options", []))
            if module_only:
                state["local_steps"] = self._local_steps.state_dict()
            elif options.get("load_lr_scheduler_states", True):
                self._load_scheduler(state)
            self._load_position(state, own=not (other or without_state))
        together.agree()
        return str(folder), state["client"]

    def _follow_options(self, folder: Path, saved: list[dict[str, Any]]) -> None:
        """Optimizers load what they were told in the saved run; where they are told something else now, that rules."""
        warn_of_other_options(folder, changed(saved, self._options))
        follow(self._engine.optimizer.param_groups, saved, self._options)

    def _load_scheduler(self, state: Mapping[str, Any]) -> None:
        if self._engine.lr_scheduler is not None and state["scheduler"]:
            self._engine.lr_scheduler.load_state_dict(state["scheduler"])
            for group, rates in zip(self._engine.optimizer.param_groups, state["rates"], strict=False):
                group.update(rates)

    def _load_position(self, state: Mapping[str, Any], *, own: bool) -> None:
        """Args: own: the parameters are those that this rank saved; else they are the average, which begins a round."""
        local = self._local_steps
        local.load_state_dict(state["local_steps"] if own else from_the_average(state["local_steps"]))
        local.averager.restart()
        if own:
            local.averager.load_state_dict(state["averager"], inside_round=not local.boundary.same_everywhere)
        self._engine.micro_steps = local.step * self._engine.gradient_accumulation_steps()
        self._loaded()

    def _check_workers(self, folder: Path, manifest: Manifest, source: str) -> None:
        """Whether the states of the workers that this rank will load can be read, in a run of this layout at all."""
        workers = {"own": [self._identity.worker], "mean": [one for one, _ in self._to_load(manifest)], "fresh": []}[
            source
        ]
        for worker in dict.fromkeys(workers):
            self._files.check(worker_folder(folder, worker))

    def _to_load(self, manifest: Manifest) -> list[tuple[int, bool]]:
        return to_load(int(manifest.layout["workers"]), self._identity.worker, self._identity.workers)

    def _source(self, folder: Path, found: Found, *, mean: bool) -> str:
        wanted = "mean" if mean else self._local_steps.qsr.on_other_workers
        return optimizer_state_from(folder, found, wanted, self._files.may_differ)

    def _load_same_layout(self, folder: Path, state: Mapping[str, Any], options: dict[str, Any]) -> None:
        if state["without_frozen"]:
            options["load_module_strict"] = False
        self._files.load(worker_folder(folder, self._identity.worker), state["own"], **options)
        put_buffers(self._engine.module, state["buffers"])
        restore_random_state(state["random"], self._engine.device)

    def _load_parameters(self, folder: Path, step: int) -> None:
        """The averaged model, whatever the layout; the optimizer is left as it is."""
        self._files.read_model(folder)
        self._engine.begin_at(step)

    def _load_other_layout(
        self, folder: Path, manifest: Manifest, found: Found, state: Mapping[str, Any], source: str
    ) -> None:
        """Parameters and step of a run with other workers, or of one's own for all, whose rank 0 had this state."""
        warn_of_other_layout(folder, found, source)
        if source == "fresh":
            self._load_parameters(folder, manifest.step)
            return

        def loaded() -> Iterator[bool]:
            for worker, counts in self._to_load(manifest):
                self._files.load(worker_folder(folder, worker), state["own"])
                yield counts

        saved, group = int(manifest.layout["workers"]), self._local_steps.averager.group
        mean_of_states(self._replica, loaded(), saved, group)
        put_buffers(self._engine.module, state["buffers"])
        if manifest.inside_round:
            self._files.read_model(folder)
