"""The training loop of a recipe: wiring only. It does not ask which engine it drives.

    for every step      micro-batches: engine(images), engine.backward(loss), engine.step()
    at a boundary       evaluation on the averaged parameters, when one is due
    every few steps     a record to the monitor, on rank 0

Between boundaries nothing here crosses ranks: rank 0 logs its own loss and its own times.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import qsr_engine
from qsr_engine.averaging import check_agreement
from qsr_engine.config import Recipe, check_world_size
from qsr_engine.data import Index
from qsr_engine.data.loader import EvalLoader, TrainLoader
from qsr_engine.models import create_model
from qsr_engine.monitor import Monitor, Record, check_run_folder, open_run_folder
from qsr_engine.recipe import Batch, dump_recipe, resolve_recipe_batch

MODEL_FILE = "model.safetensors"


class DivergenceError(RuntimeError):
    """The loss is not finite: training on would burn hours for nothing."""


def train(recipe: Recipe, index: Index) -> dict[str, Any]:
    """Train a resolved recipe in this process, one rank of those that a launcher started.

    Args:
        recipe: as resolve_recipe() gives it.
        index: of recipe.data.shards, whose shards have been checked.
    Returns:
        The final figures, as in the run's `summary.json`.
    Raises:
        ConfigError, AgreementError, BoundaryError, DataError, DivergenceError: the message is for the user.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    check_world_size(ranks, recipe.qsr.worker_size)
    batch = resolve_recipe_batch(recipe, ranks)
    if rank == 0:
        check_run_folder(recipe.run_dir)
    _share_cores()
    torch.manual_seed(recipe.seed)
    model = create_model(recipe.model, index.class_count, recipe.data.image_size)
    if index.classes is None:  # so that a label that is too large is found where it is read
        names = [str(label) for label in range(recipe.model.kwargs["num_classes"])]
        index = index.model_copy(update={"classes": names})
    engine, *_ = qsr_engine.initialize(
        model=model, optimizer=partial(_optimizer, recipe), config=deepspeed_config(recipe, batch)
    )
    check_agreement({"recipe": _shared(recipe), "data": index.digest()}, engine.device)
    torch.manual_seed(recipe.seed + 1 + rank)  # dropout differs between ranks
    if rank == 0:
        open_run_folder(recipe.run_dir, dump_recipe(recipe))
    loaders = {"rank": rank, "ranks": ranks, "batch_size": batch.micro}
    total_steps = recipe.qsr.total_steps
    assert total_steps is not None, "resolve_recipe() fills it in"
    with Monitor(recipe.run_dir, total_steps, tensorboard=recipe.logging.tensorboard, enabled=rank == 0) as monitor:
        run = _Run(
            recipe,
            engine,
            TrainLoader(
                recipe.data.shards,
                index,
                recipe.data,
                batches_per_epoch=index.split(recipe.data.train).samples // batch.train * batch.accumulation,
                seed=recipe.seed,
                **loaders,
            ),
            EvalLoader(recipe.data.shards, index, recipe.data, **loaders),
            monitor,
            batch,
        )
        run.loop()
        summary = run.summary()
        if rank == 0:
            _save_model(engine.module, recipe)
            monitor.summary(**summary)
    return summary


def deepspeed_config(recipe: Recipe, batch: Batch) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe, its `"qsr"` block included."""
    return {
        "train_batch_size": batch.train,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "bf16": {"enabled": recipe.precision.dtype == "bf16"},
        "zero_optimization": {"stage": recipe.precision.zero_stage},
        "zero_allow_untested_optimizer": True,  # DeepSpeed has not tested torch's SGD under ZeRO; the tests here have
        "qsr": recipe.qsr.model_dump(exclude_none=True),
    }


def _optimizer(recipe: Recipe, parameters: Any) -> torch.optim.Optimizer:
    options = recipe.optimizer
    if options.type == "SGD":
        return torch.optim.SGD(
            parameters,
            lr=recipe.qsr.lr.peak,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
        )
    return torch.optim.AdamW(
        parameters,
        lr=recipe.qsr.lr.peak,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
        weight_decay=options.weight_decay,
    )


def _shared(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that must be the same on every rank; hosts may keep shards and runs in other places."""
    return recipe.model_dump(exclude={"data": {"shards"}, "logging": {"dir"}})


def _share_cores() -> None:
    """On a CPU, give each rank of this host its share of the cores, unless OMP_NUM_THREADS says another number."""
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_SIZE", "1"))))


def _save_model(module: torch.nn.Module, recipe: Recipe) -> None:
    """The averaged model as safetensors; timm's and torchvision's models load it with load_state_dict()."""
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}
    path = recipe.run_dir / MODEL_FILE
    save_file(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


@dataclass
class _Clock:
    """Where the wall-clock time goes, in seconds; evaluation counts nowhere."""

    started: float = field(default_factory=time.perf_counter)
    data: float = 0.0
    evaluation: float = 0.0

    def training(self) -> float:
        return time.perf_counter() - self.started - self.evaluation


class _Run:
    """One run in progress."""

    def __init__(
        self, recipe: Recipe, engine: Any, train: TrainLoader, evaluation: EvalLoader, monitor: Monitor, batch: Batch
    ) -> None:
        self.recipe = recipe
        self.engine = engine
        self.batches: Iterator[tuple[Tensor, Tensor]] = train.batches()
        self.evaluation = evaluation
        self.monitor = monitor
        self.batch = batch
        self.dtype = torch.bfloat16 if recipe.precision.dtype == "bf16" else torch.float32
        self.clock = _Clock()
        self.accuracy = self.loss = math.nan
        self._losses: list[Tensor] = []
        self._logged = (0, 0.0)  # step and training seconds of the last record

    def loop(self) -> None:
        state, every = self.engine.local_steps, self.recipe.logging.every
        next_evaluation = self.recipe.logging.eval_every or state.qsr.total_steps
        while not state.finished:
            before: dict[str, Any] = {"round": state.round, "period": state.period, "lr": state.learning_rate}
            boundary = self._step()
            evaluated: dict[str, Any] = {}
            if boundary and (state.step >= next_evaluation or state.finished):
                evaluated = self._evaluate()
                interval = self.recipe.logging.eval_every or state.qsr.total_steps
                next_evaluation = (state.step // interval + 1) * interval
            if evaluated or state.step % every == 0:
                self._log(before, evaluated)

    def _step(self) -> bool:
        """One optimizer step. Returns True at a boundary."""
        boundary = False
        for _ in range(self.batch.accumulation):
            started = time.perf_counter()
            images, labels = next(self.batches)
            self.clock.data += time.perf_counter() - started
            scores = self.engine(images.to(self.engine.device, self.dtype))
            loss = F.cross_entropy(
                scores.float(), labels.to(self.engine.device), label_smoothing=self.recipe.label_smoothing
            )
            self.engine.backward(loss)
            self._losses.append(loss.detach())
            boundary = self.engine.step()
        return boundary

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Accuracy (%) and loss over the whole evaluation split, on the averaged parameters, over all ranks."""
        started = time.perf_counter()
        self.engine.local_steps.wait()
        self.engine.local_steps.average_buffers()
        self.engine.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.engine.device)  # samples, right ones, summed loss
        for images, labels in self.evaluation:
            scores = self.engine.module(images.to(self.engine.device, self.dtype)).float()
            labels = labels.to(self.engine.device)
            right = (scores.argmax(1) == labels).sum()
            loss = F.cross_entropy(scores, labels, reduction="sum")
            totals += torch.stack([torch.tensor(float(len(labels)), device=loss.device), right, loss]).double()
        dist.all_reduce(totals)
        self.engine.train()
        samples, right, loss = totals.tolist()
        self.accuracy, self.loss = 100 * right / samples, loss / samples
        self.clock.evaluation += time.perf_counter() - started
        return {"eval_accuracy": self.accuracy, "eval_loss": self.loss}

    def _log(self, before: dict[str, Any], evaluated: dict[str, Any]) -> None:
        loss = torch.stack(self._losses).mean().item()  # waits for the device, so the times below are true
        self._losses.clear()
        state = self.engine.local_steps
        step, seconds = self._logged
        figures = self._figures()
        self._logged = (state.step, self.clock.training())
        images = (state.step - step) * self.batch.train
        self.monitor.log(
            Record(
                **before,
                **figures,
                **evaluated,
                step=state.step,
                loss=loss,
                images_per_second=images / max(1e-9, self._logged[1] - seconds),
                relative_distance=state.relative_distance,
            )
        )
        if not math.isfinite(loss):
            raise DivergenceError(
                f"the loss is {loss} at step {state.step}; a lower qsr.lr.peak, a longer warm-up or "
                "optimizer.gradient_clipping helps against divergence"
            )

    def _figures(self) -> dict[str, Any]:
        """What the run has cost so far."""
        state, training = self.engine.local_steps, self.clock.training()
        averaging = self.engine.seconds_averaging
        return {
            "images_seen": state.step * self.batch.train,
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
            "images_per_second": state.step * self.batch.train / training,
            "ranks": dist.get_world_size(),
            "worker_size": self.recipe.qsr.worker_size,
            "device": self.engine.device.type,
            "torch": torch.__version__,
        }
