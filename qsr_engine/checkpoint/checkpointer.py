"""Saving a run and going on from it, as both engines do it: a checkpointer is given what has a `state_dict()`.

    worker-00000/rank-00000.pt local steps, random states, the averager's and the scheduler's state, the caller's own
    worker-00000/...           what the engine itself writes for this worker (deepspeed/ or fsdp/)

A run with the same layout goes on bit for bit. One with another number of workers takes the parameters, which are the
same on every worker, and the mean of the workers' optimizer state, or none (`qsr.on_other_workers`). One whose layout
differs in more than the engine can convert takes the parameters only, and so does one of the other engine.
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

from qsr_engine.checkpoint.find import find
from qsr_engine.checkpoint.manifest import MODEL_FILE, CheckpointError, Manifest, plain
from qsr_engine.checkpoint.other_layout import (
    Found,
    check_same_model,
    found_in,
    mean_of_states,
    optimizer_state_from,
    warn_of_other_configuration,
    warn_of_other_layout,
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
from qsr_engine.local_steps.steps import LocalSteps

_RATES = ("lr", "initial_lr")  # of a parameter group; a scheduler keeps them there, and goes on from them
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

    def model(self, *, keep: bool) -> dict[str, Tensor]:
        """Parameters and buffers, as model_file.named_state() gives them; called on every rank of worker 0."""

    def read_model(self, folder: Path, only: set[str] | None) -> None:
        """Put the averaged model of a checkpoint, or only these parameters, into the masters and the buffers."""


class Engine(Protocol):
    """What a checkpointer reads of an engine. A step has several micro-batches under gradient accumulation."""

    module: nn.Module
    optimizer: Any  # has param_groups
    lr_scheduler: Any  # None where there is none
    device: torch.device
    global_steps: int
    micro_steps: int

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
    """Saves one engine's run on boundaries, and goes on from what it saved.

    Args:
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
        loaded: Callable[[], None],
    ) -> None:
        self._identity, self._engine, self._replica = identity, engine, replica
        self._files, self._local_steps, self._loaded = files, local_steps, loaded
        self._model_is_read: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def while_model_is_read(self, context: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """Enter this on every rank while the averaged model is read, to change its buffers for so long."""
        self._model_is_read = context

    # ---------------------------------------------------------------------------------------------------- save

    def save(
        self, directory: str | os.PathLike[str], tag: Any, client: Any, *, latest: bool, keep: int | None, frozen: bool
    ) -> None:
        """As engines.surface says of save_checkpoint(); not `frozen`: leave out parameters that are not trained."""
        self._local_steps.rounds.check_boundary("save")
        self._check_whole_step("save")
        self._local_steps.wait()
        client = client or {}
        if not isinstance(client, Mapping):
            raise CheckpointError(f"client_state is a {type(client).__name__}; give a dict")
        workers = range(self._identity.workers)
        save(
            directory,
            str(tag or f"global_step{self._engine.global_steps}"),
            lambda folder: self.write(folder, client, without_frozen=not frozen),
            step=self._local_steps.step,
            layout=self._identity.layout,
            config=self._identity.config,
            latest=latest,
            folders=[str(worker_folder(Path(), worker) / self._files.folder) for worker in workers],
            keep=keep,
        )

    def _check_whole_step(self, what: str) -> None:
        accumulation = self._engine.gradient_accumulation_steps()
        done = self._engine.micro_steps % accumulation
        if done:
            raise RuntimeError(
                f"{done} of the {accumulation} micro-batches of step {self._local_steps.step} "
                f"have been seen, and no checkpoint has their gradients; {what} before the first or after the last one"
            )

    def write(self, folder: Path, client: Mapping[str, Any], *, without_frozen: bool) -> None:
        """This rank's part of a checkpoint, in a folder that nobody else uses."""
        model, worker, rank = self.averaged_model(), self._identity.worker, dist.get_rank()
        scheduler, groups = self._engine.lr_scheduler, self._engine.optimizer.param_groups
        self._files.write(worker_folder(folder, worker), without_frozen=without_frozen)
        if rank == 0:
            save_file(model, folder / MODEL_FILE, metadata={"format": "pt"})
        write_rank(
            rank_file(folder, worker, rank),
            {
                "local_steps": self._local_steps.state_dict(),
                "averager": self._local_steps.averager.state_dict(),
                "scheduler": scheduler.state_dict() if scheduler is not None else None,
                "rates": [{key: group[key] for key in _RATES if key in group} for group in groups],
                "random": random_state(self._engine.device),
                "client": dict(client),
                "buffers": [buffer.detach().cpu() for buffer in self._engine.module.buffers()],
                "without_frozen": without_frozen,
                "own": self._files.state_dict(),
            },
        )

    def averaged_model(self) -> dict[str, Tensor]:
        """As engines.surface says of averaged_state_dict()."""
        self._local_steps.rounds.check_boundary("ask for the averaged model")
        self._local_steps.wait()
        with self._model_is_read(), self._local_steps.boundary.buffers.averaged():
            if self._identity.worker != 0:
                return {}
            return self._files.model(keep=dist.get_rank() == 0)

    # ---------------------------------------------------------------------------------------------------- load

    def load(
        self, directory: str | os.PathLike[str], *args: Any, **options: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """As engines.surface says of load_checkpoint()."""
        self._check_whole_step("load")
        self._local_steps.averager.finish()
        options.update(zip(_LOAD_OPTIONS, args, strict=False))
        tag, module_only = options.pop("tag", None), bool(options.pop("load_module_only", False))
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
        together = Together(f"loading the checkpoint {folder}")
        with together.step():
            rank, worker = (0, 0) if found else (dist.get_rank(), self._identity.worker)
            state = read_rank(rank_file(folder, worker, rank))
            if not without_state:
                self._check_workers(folder, manifest, found)
        together.agree()  # before the first collective, in which the others would wait for a rank that cannot read
        with together.step():
            if without_state:
                self._load_parameters(folder, 0 if module_only else manifest.step)
            elif found:
                self._load_other_layout(folder, manifest, found, state)
            else:
                self._load_same_layout(folder, state, options)
            if module_only:
                state["local_steps"] = self._local_steps.state_dict()
            elif options.get("load_lr_scheduler_states", True):
                self._load_scheduler(state)
            self._load_position(state, with_averager=not found)
        together.agree()
        return str(folder), state["client"]

    def _load_scheduler(self, state: Mapping[str, Any]) -> None:
        if self._engine.lr_scheduler is not None and state["scheduler"]:
            self._engine.lr_scheduler.load_state_dict(state["scheduler"])
            for group, rates in zip(self._engine.optimizer.param_groups, state["rates"], strict=False):
                group.update(rates)

    def _load_position(self, state: Mapping[str, Any], *, with_averager: bool) -> None:
        local = self._local_steps
        local.load_state_dict(state["local_steps"])
        local.averager.restart()
        if with_averager and state["averager"]:
            local.averager.load_state_dict(state["averager"])
        self._engine.micro_steps = local.step * self._engine.gradient_accumulation_steps()
        self._loaded()

    def _check_workers(self, folder: Path, manifest: Manifest, found: Found) -> None:
        """Whether the states of the workers that this rank will load can be read, in a run of this layout at all."""
        workers = [self._identity.worker]
        if found:
            workers = list(range(int(manifest.layout["workers"]))) if self._source(folder, found) == "mean" else []
        for worker in workers:
            self._files.check(worker_folder(folder, worker))

    def _source(self, folder: Path, found: Found) -> str:
        return optimizer_state_from(folder, found, self._local_steps.qsr.on_other_workers, self._files.may_differ)

    def _load_same_layout(self, folder: Path, state: Mapping[str, Any], options: dict[str, Any]) -> None:
        if state["without_frozen"]:
            options["load_module_strict"] = False
        self._files.load(worker_folder(folder, self._identity.worker), state["own"], **options)
        if state["without_frozen"]:
            self._read_frozen(folder)
        self._put_buffers(state)
        restore_random_state(state["random"], self._engine.device)

    @torch.no_grad()
    def _put_buffers(self, state: Mapping[str, Any]) -> None:
        for buffer, value in zip(self._engine.module.buffers(), state["buffers"], strict=True):
            buffer.copy_(value)

    def _read_frozen(self, folder: Path) -> None:
        """What the engine's own files were told to leave out."""
        frozen = {name for name, parameter in self._engine.module.named_parameters() if not parameter.requires_grad}
        self._files.read_model(folder, frozen)

    def _load_parameters(self, folder: Path, step: int) -> None:
        """The averaged model, whatever the layout; the optimizer is left as it is."""
        self._files.read_model(folder, None)
        self._engine.begin_at(step)

    def _load_other_layout(self, folder: Path, manifest: Manifest, found: Found, state: Mapping[str, Any]) -> None:
        """Parameters and step of a run with other workers, whose rank 0 had this state."""
        source = self._source(folder, found)
        warn_of_other_layout(folder, found, source)
        if source == "fresh":
            self._load_parameters(folder, manifest.step)
            return

        def loaded() -> Iterator[None]:
            for worker in range(int(manifest.layout["workers"])):
                self._files.load(worker_folder(folder, worker), state["own"])
                yield

        mean_of_states(self._replica, loaded())
        self._put_buffers(state)
        if state["without_frozen"]:
            self._read_frozen(folder)
