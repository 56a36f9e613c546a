"""How large a run's model is, and the bytes that leave a worker of it: at an averaging, and at a step of `parallel`.

Nothing here imports torch, but for the size of a model where nobody says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qsr_engine.config.batch import resolve_batch
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_batch import resolve_recipe_batch
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import Index, TextData, read_index
from qsr_engine.local_steps.traffic import (
    PIECE,
    averaging_bytes,
    bytes_percent,
    deepspeed_parallel_bytes,
    fsdp_parallel_bytes,
    payload,
)
from qsr_engine.planning.cost import BUCKET_BYTES, HIDDEN_BY_BACKWARD, Counts
from qsr_engine.planning.layout import Shapes, averaged_tensors
from qsr_engine.schedule import due_fragments

CLASSES = 1000  # of a model whose data nobody has seen: ImageNet's
VOCABULARY, CONTEXT = 256, 64  # of a language model likewise: bytes
KEPT = 100_000  # elements of a tensor up to which stage 3 keeps it: stage3_param_persistence_threshold


@dataclass(frozen=True)
class Size:
    """Elements of a model.

    Args:
        small: parameters in tensors of at most KEPT.
        buffers: that are averaged.
        shapes: of the parameters, by group of the optimizer; empty where nobody has seen the model.
    """

    parameters: int
    small: int = 0
    buffers: int = 0
    shapes: tuple[Shapes, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Bytes that leave a worker.

    Args:
        averaging: at an averaging of all parameters.
        gradients: at a step of `parallel`.
        early_gradients: at a step of `post_local` before its switch.
        hidden_share: of a step, beside which those of `parallel` travel; 0 where they travel after the backward pass.
        last_bucket: share of them that is ready only at its end.
    """

    workers: int
    parameters: int
    averaging: int
    gradients: int
    early_gradients: int
    hidden_share: float
    last_bucket: float
    fragments: int = 1

    @property
    def at_once(self) -> int:
        """What leaves a worker at one step, but for the run's last one: a fragment's share, in the mean."""
        return -(-self.averaging // self.fragments)

    def of(self, counts: Counts) -> int:
        """In a whole run; at its end, the fragments that the last round has averaged before are averaged again."""
        each = self.gradients if counts.strategy == "parallel" else self.early_gradients
        before = self.fragments - len(due_fragments(counts.last, counts.last, self.fragments)) if counts.last else 0
        again = before * self.averaging // self.fragments
        return counts.gradients * each + counts.averagings * self.averaging + again

    def percent(self, counts: Counts) -> float:
        """Of what `parallel` would send in as many steps."""
        return bytes_percent(self.of(counts), counts.steps * self.gradients)


@dataclass(frozen=True)
class _Engine:
    """How an engine sends gradients. Args: stage: of ZeRO, None for FSDP; reduced: their type; dtype: of the model."""

    stage: int | None
    reduced: str
    dtype: str
    accumulation: int
    hidden: bool  # beside the backward pass


def recipe_sizes(recipe: Recipe, qsr: QSRConfig, size: Size, workers: int) -> Sizes:
    """Bytes of a recipe's run. Raises ConfigError where its batch cannot be divided among so many workers."""
    accumulation = resolve_recipe_batch(recipe, workers * qsr.worker_size).accumulation
    if recipe.engine == "fsdp":
        return _sizes(qsr, size, workers, _Engine(None, "fp32", "fp32", accumulation, hidden=True))
    dtype, stage = recipe.precision.dtype, recipe.precision.zero_stage
    reduced = recipe.precision.autocast or dtype
    return _sizes(qsr, size, workers, _Engine(stage, reduced, dtype, accumulation, hidden=stage == 3))


def deepspeed_sizes(config: Mapping[str, Any], qsr: QSRConfig, size: Size, workers: int) -> Sizes:
    """Bytes of a run by a DeepSpeed configuration, which nobody has checked; what it leaves out is DeepSpeed's default.

    Raises:
        ConfigError: its batch sizes contradict one another.
    """
    zero = _block(config, "zero_optimization")
    stage = zero["stage"] if zero.get("stage") in (1, 2, 3) else 0
    on = [key for key in ("bf16", "bfloat16", "fp16") if _block(config, key).get("enabled") is True]
    dtype = on[0].replace("bfloat", "bf") if on else "fp32"
    named = {"bfp16": "bf16"}.get(name := str(config.get("communication_data_type")), name)
    reduced = named if named in ("fp32", "bf16", "fp16") else dtype
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, times = (n if isinstance(n := config.get(key), int) and n > 0 else None for key in keys)
    if total or micro:
        ranks = workers * qsr.worker_size
        *_, times = resolve_batch(ranks, train_batch_size=total, micro_batch_size=micro, accumulation=times)
    hidden = stage > 0 and zero.get("overlap_comm", stage == 3) is True
    return _sizes(qsr, size, workers, _Engine(stage, reduced, dtype, times or 1, hidden))


def _sizes(qsr: QSRConfig, size: Size, workers: int, engine: _Engine) -> Sizes:
    averaging, ranks, parameters = qsr.averaging, qsr.worker_size, size.parameters
    piece = min(PIECE, int(averaging.bucket_mb * 1e6) if averaging.bucket_mb else PIECE)
    sharded, kept = engine.stage != 0, size.small if engine.stage == 3 else 0
    if engine.stage is None:
        gradients = fsdp_parallel_bytes({engine.reduced: parameters}, workers)
    else:
        gradients = deepspeed_parallel_bytes(
            {engine.reduced: parameters},
            workers,
            ranks,
            zero_stage=engine.stage,
            gathered={engine.reduced if engine.stage == 3 else engine.dtype: parameters - kept},
            kept={engine.reduced: kept},
            accumulation=engine.accumulation,
        )
    return Sizes(
        workers,
        parameters,
        averaging=averaging_bytes(
            {"fp32": parameters},
            workers,
            ranks,
            sharded=sharded,
            wire=averaging.wire_dtype,
            states=sum(1 / period for period in averaging.state_periods.values()),
            buffers=size.buffers if averaging.buffers == "average" else 0,
            tensors=averaged_tensors(size.shapes, engine.stage, ranks, piece) if size.shapes else None,
            piece=piece,
        ),
        gradients=gradients,
        early_gradients=averaging_bytes({engine.dtype: parameters}, workers, ranks, sharded=sharded),
        hidden_share=HIDDEN_BY_BACKWARD if engine.hidden else 0.0,
        last_bucket=min(1.0, BUCKET_BYTES / payload({engine.reduced: parameters})),
        fragments=averaging.fragments,
    )


def _block(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    block = config.get(key)
    return block if isinstance(block, Mapping) else {}


def model_size(recipe: Recipe) -> tuple[Size, list[str]]:
    """Size of a recipe's model, which is made for that, and what was assumed. Raises ConfigError: no such model."""
    from qsr_engine.checkpoint.buffers import persistent_buffers
    from qsr_engine.training.make_task import make_task
    from qsr_engine.training.optimizer import parameter_groups

    index, assumed = index_of(recipe)
    model = make_task(recipe, index).create_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [group["params"] for group in parameter_groups(recipe, model, trained)]
    numbers = [parameter.numel() for parameter in trained]
    small, buffers = sum(n for n in numbers if n <= KEPT), persistent_buffers(model).values()
    shapes = tuple(tuple(tuple(parameter.shape) for parameter in group) for group in groups)
    return Size(sum(numbers), small, sum(buffer.numel() for buffer in buffers), shapes), assumed


def index_of(recipe: Recipe) -> tuple[Index, list[str]]:
    """The index of a recipe's data, or one that stands for it, and what was assumed there."""
    kwargs, known = recipe.model.kwargs, recipe.task == "text" or "num_classes" in recipe.model.kwargs
    try:
        index = read_index(recipe.data.shards)
        if known or index.class_count is not None:
            return index, []
    except DataError:
        pass
    if recipe.task == "text":
        # What is wrong with these keys is said where the model is made.
        sizes = {key: size for key, size in kwargs.items() if isinstance(size, int) and 1 < size < 2**31}
        vocabulary = sizes.get("vocab_size", VOCABULARY)
        context = min(CONTEXT, *(sizes.get(key, CONTEXT) for key in ("max_position_embeddings", "n_positions")))
        text = TextData(context=context, vocabulary=vocabulary, end=0, bytes_per_token={})
        return Index(classes=None, splits={}, text=text), [
            f"{vocabulary} tokens and a context of {context}, since there are no shards that say it"
        ]
    if "num_classes" in kwargs:
        return Index(classes=None, splits={}), []
    return Index(classes=[str(label) for label in range(CLASSES)], splits={}), [
        f"{CLASSES} classes, since neither shards nor model.kwargs.num_classes say how many"
    ]
