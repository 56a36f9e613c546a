"""The cost model of a run, from its settings and its recipe, and what that assumes.

Nothing here imports torch, but for the number of a model's parameters where nobody says it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.config.units import bytes_text, counted, rate_text, seconds_text
from qsr_engine.data.errors import DataError
from qsr_engine.data.index import read_index
from qsr_engine.planning.cost import HIDDEN_BY_BACKWARD, HIDDEN_BY_FORWARD, CostModel, StepTime
from qsr_engine.planning.settings import CostSettings

_ELEMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0}
_BLOCK = 512  # elements of fp16 and int8 that share one scale of 4 bytes on the wire, as in averaging/compressed.py
CLASSES = 1000  # of a model whose data nobody has seen: ImageNet's


def cost_model(
    settings: CostSettings, qsr: QSRConfig, recipe: Recipe | None, deepspeed: Mapping[str, Any] | None = None
) -> tuple[CostModel, list[str]]:
    """The cost model of a run, and what it assumes, a line each.

    Args:
        recipe: None for a DeepSpeed configuration, which does not say the model.
        deepspeed: that configuration.
    Raises:
        ConfigError: the size of the model is not known, it is not the model that was measured, or two levels are
            asked for on hosts that hold different numbers of workers.
    """
    if settings.two_level is None and qsr.averaging.two_level is True:
        settings = settings.model_copy(update={"two_level": True})
    _check_two_levels(settings)
    other = [] if recipe is None else _other_than_measured(settings, recipe)
    deepspeed = deepspeed or {}
    parameters, counted = _parameters(settings, recipe)
    backward = _backward_share(recipe, deepspeed) if settings.backward_share is None else settings.backward_share
    model = CostModel(
        step=StepTime(settings.step_seconds, settings.step_cv, settings.worker_cv),
        network=settings.network,
        workers=settings.workers,
        parameter_bytes=payload_of_averaging(qsr, parameters),
        gradient_bytes=parameters * _gradient_element_bytes(recipe, deepspeed),
        backward_share=backward,
        forward_share=_forward_share(settings.overlap, qsr),
        boundary_seconds=settings.boundary_seconds,
        gradient_efficiency=settings.gradient_efficiency,
    )
    return model, [*_assumptions(settings, model), *other, *counted]


def _check_two_levels(settings: CostSettings) -> None:
    workers, per_host = settings.workers, settings.workers_per_host
    if settings.two_level and workers > per_host and workers % per_host:
        raise ConfigError(
            f"two levels need as many workers on every host; found {workers} workers with {per_host} on a host, "
            f"which leaves {workers % per_host} on the last; write --workers or --workers-per-host so that they divide"
        )


def _other_than_measured(settings: CostSettings, recipe: Recipe) -> list[str]:
    """What of this run is not as it was measured, a line each. Raises ConfigError where that is the model."""
    measured = settings.measured
    model, batch, workers = (measured.get(key) for key in ("model", "train_batch_size", "workers"))
    if isinstance(model, str) and model != recipe.model.name:
        raise ConfigError(
            f"the costs were measured with the model {model!r}, and the recipe's is {recipe.model.name!r}; measure "
            "this recipe with --measure"
        )
    lines = []
    if isinstance(workers, int) and workers != settings.workers:
        lines.append(f"measured with {counted(workers, 'worker')}, and taken for {settings.workers}")
    if isinstance(batch, int) and isinstance(workers, int) and workers > 0:
        then, now = batch / workers, recipe.batch.train_batch_size / settings.workers
        if then != now:
            lines.append(
                f"measured with {then:g} samples a step of one worker, and this run has {now:g}: its step takes "
                "another time, which --step-seconds can say"
            )
    micro, mine = measured.get("micro_batch"), recipe.batch.train_micro_batch_size_per_gpu
    if mine is not None and isinstance(micro, int) and micro != mine:
        lines.append(f"measured with micro-batches of {micro} samples a rank, and this run has {mine}")
    return lines


def _assumptions(settings: CostSettings, model: CostModel) -> list[str]:
    network, hosts = model.network, model.network.hosts(model.workers)
    way = {"ring": "one ring", "tree": "two trees"}[network.algorithm] + (
        " between hosts, after a reduction inside each" if network.two_level else " over all workers"
    )
    hidden = "behind nothing" if not model.forward_share else f"behind {model.forward_share:.2g} of the next step"
    return [
        f"step: {seconds_text(settings.step_seconds)} of compute, cv {settings.step_cv:.3g} from step to step and "
        f"{settings.worker_cv:.3g} from worker to worker, lognormal and independent",
        f"network: {counted(model.workers, 'worker')} on {counted(hosts, 'host')}; a host's port has "
        f"{rate_text(network.bandwidth)} each way, {seconds_text(network.latency)} latency; inside a host "
        f"{rate_text(network.local_bandwidth)}; {way} reaches {100 * network.efficiency:.3g} % of it",
        f"an averaging: {bytes_text(model.parameter_bytes)}, {seconds_text(model.averaging_seconds())}, {hidden}, "
        f"and {seconds_text(model.boundary_seconds)} for each boundary",
        f"a step of parallel: {bytes_text(model.gradient_bytes)} of gradients, "
        + (f"behind {model.backward_share:.2g} of the step" if model.backward_share else "after the backward pass")
        + (f", at {model.gradient_efficiency:.3g} of an averaging's rate" if model.gradient_efficiency != 1 else ""),
        "data, evaluation and checkpoints cost nothing, and nobody else uses the network",
    ]


def payload_of_averaging(qsr: QSRConfig, parameters: int) -> float:
    """Bytes of one averaging: fp32 masters, or their differences in fewer bits, and fp32 optimizer state."""
    wire = qsr.averaging.wire_dtype
    scales = 4.0 / _BLOCK if wire in ("fp16", "int8") else 0.0
    return parameters * (_ELEMENT_BYTES[wire] + scales + 4.0 * len(qsr.averaging.state))


def gradient_type(recipe: Recipe) -> Literal["fp32", "bf16", "fp16"]:
    """FSDP reduces gradients in fp32, DeepSpeed in the type of the model's copy."""
    return "fp32" if recipe.engine == "fsdp" else recipe.precision.dtype


def _gradient_element_bytes(recipe: Recipe | None, deepspeed: Mapping[str, Any]) -> float:
    """Of a DeepSpeed configuration's gradients, communication_data_type says the type where it stands."""
    if recipe is not None:
        return _ELEMENT_BYTES[gradient_type(recipe)]
    named = {"bfp16": "bf16"}.get(
        str(deepspeed.get("communication_data_type")), deepspeed.get("communication_data_type")
    )
    if named in ("fp32", "bf16", "fp16"):
        return _ELEMENT_BYTES[named]
    half = any(_block(deepspeed, key).get("enabled") is True for key in ("bf16", "bfloat16", "fp16"))
    return 2.0 if half else 4.0


def _backward_share(recipe: Recipe | None, deepspeed: Mapping[str, Any]) -> float:
    """DeepSpeed reduces gradients after the backward pass (stage 0) or in it, without overlap (1 and 2)."""
    if recipe is not None:
        after = recipe.engine == "deepspeed" and recipe.precision.zero_stage < 3
        return 0.0 if after else HIDDEN_BY_BACKWARD
    zero = _block(deepspeed, "zero_optimization")
    stage = zero.get("stage", 0)
    overlap = stage in (1, 2, 3) and zero.get("overlap_comm", stage == 3) is True
    return HIDDEN_BY_BACKWARD if overlap else 0.0


def _block(deepspeed: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A block of a DeepSpeed configuration, which nobody has checked."""
    block = deepspeed.get(key)
    return block if isinstance(block, Mapping) else {}


def _forward_share(overlap: str | None, qsr: QSRConfig) -> float:
    overlap = overlap or qsr.averaging.overlap
    if overlap == "delayed":
        return float(qsr.averaging.delay_steps or 1)
    return HIDDEN_BY_FORWARD if overlap == "next_forward" else 0.0


def _parameters(settings: CostSettings, recipe: Recipe | None) -> tuple[int, list[str]]:
    """Number of parameters, and what was assumed about it."""
    if settings.parameters is not None:
        return settings.parameters, []
    if recipe is None:
        raise ConfigError("a DeepSpeed configuration does not say how large the model is; write --parameters N")
    return count_parameters(recipe)


def count_parameters(recipe: Recipe) -> tuple[int, list[str]]:
    """Number of trained parameters of a recipe's model, which is made for that, and what was assumed about it.

    Raises:
        ConfigError: no such model.
    """
    from qsr_engine.training.models import create_model

    classes, assumed = class_count(recipe)
    model = create_model(recipe.model, classes, recipe.data.image_size)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), assumed


def class_count(recipe: Recipe) -> tuple[int | None, list[str]]:
    """Classes of a recipe's data, and what was assumed where neither recipe nor shards say it."""
    if "num_classes" in recipe.model.kwargs:
        return None, []
    try:
        found = read_index(recipe.data.shards).class_count
    except DataError:
        found = None
    if found is not None:
        return found, []
    return CLASSES, [f"{CLASSES} classes, since neither shards nor model.kwargs.num_classes say how many"]
