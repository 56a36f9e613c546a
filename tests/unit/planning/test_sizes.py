"""What leaves a worker of a recipe or of a DeepSpeed configuration, by hand: P parameters, K workers of s ranks."""

from __future__ import annotations

from typing import Any

import pytest

from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.planning.cost import Counts
from qsr_engine.planning.plan import make_plan
from qsr_engine.planning.sizes import KEPT, Size, deepspeed_sizes, model_size, recipe_sizes
from qsr_engine.schedule import due_fragments
from tests.support.forecasts import CONFIGS, VIT

P = 1 << 20  # which blocks and ranks divide
BF16 = ["precision={dtype: bf16, zero_stage: 1}"]


@pytest.mark.parametrize(
    ("overrides", "workers", "averaging", "gradients"),
    [
        # One pass over 16 ranks carries 15/16 of the payload out of a worker; stage 1 reduces gradients in two, and
        # gathers parameters in one. FSDP has a ring over the 2 workers, in fp32.
        (["qsr.worker_size=8", *BF16], 2, 4 * P, 3 * 15 * 2 * P // 16),
        (["qsr.worker_size=8", "engine=fsdp"], 2, 4 * P, 4 * P),
        (["precision={dtype: fp32}"], 4, 6 * P, 6 * P),
        (["precision={dtype: fp32, autocast: bf16}"], 4, 6 * P, 3 * P),
        (["precision={dtype: fp32}", "qsr.worker_size=2"], 2, 8 * P, 2 * 3 * P),  # each of the 2 ranks sends all of it
        (["qsr.averaging={wire_dtype: bf16}", *BF16], 2, 2 * P, 3 * P),
        (["qsr.averaging={state: [exp_avg]}", *BF16], 2, 8 * P, 3 * P),
        (["qsr.averaging={state: {exp_avg: 2, exp_avg_sq: 4}}", *BF16], 2, 7 * P, 3 * P),
    ],
)
def test_a_recipe(overrides: list[str], workers: int, averaging: int, gradients: int) -> None:
    plan = make_plan(VIT, overrides=overrides)
    assert plan.recipe is not None
    found = recipe_sizes(plan.recipe, plan.qsr, Size(P), workers)
    assert (found.averaging, found.gradients) == (averaging, gradients)


@pytest.mark.parametrize(("stage", "factor"), [(0, 1), (1, 1), (2, 4 * 2 / 3 + 1 / 3), (3, 4)])
def test_accumulation_costs_what_an_engine_sends_for_each_micro_batch(stage: int, factor: float) -> None:
    """Stages 0 and 1 send gradients once a step, 2 and 3 after each of the 4 micro-batches; FSDP once."""
    found = []
    for micro in (1024, 256):
        sets = [f"precision.zero_stage={stage}", f"batch.train_micro_batch_size_per_gpu={micro}"]
        plan = make_plan(VIT, overrides=[*sets, "precision.autocast=null", "precision.dtype=fp32"])
        assert plan.recipe is not None
        found.append(recipe_sizes(plan.recipe, plan.qsr, Size(P), 4).gradients)
        plan = make_plan(VIT, overrides=[*sets[1:], "engine=fsdp"])
        assert plan.recipe is not None
        assert recipe_sizes(plan.recipe, plan.qsr, Size(P), 4).gradients == 6 * P
    assert found[1] == pytest.approx(factor * found[0])


def test_stage_3_keeps_small_tensors() -> None:
    """Gathered once a step, and not for each of the 4 micro-batches, as their gradients are reduced."""
    sets = ["precision={dtype: fp32, zero_stage: 3}", "batch.train_micro_batch_size_per_gpu=256"]
    plan = make_plan(VIT, overrides=sets)
    assert plan.recipe is not None
    found = [recipe_sizes(plan.recipe, plan.qsr, Size(P, small), 4).gradients for small in (0, P)]
    assert found == [(4 + 4) * 3 * P, (4 + 1) * 3 * P]


def test_shares_of_a_whole_run() -> None:
    """bf16 gradients, one pass each, and fp32 averagings: the bytes are twice the averagings' share."""
    plan = make_plan(VIT, overrides=["precision={dtype: bf16}"])
    assert plan.recipe is not None
    found = recipe_sizes(plan.recipe, plan.qsr, Size(P), 4)
    assert found.percent(Counts("parallel", 100, 100, 0)) == 100
    assert found.percent(Counts("qsr", 100, 0, 10)) == 20
    assert found.percent(Counts("post_local", 100, 50, 10)) == 70


@pytest.mark.parametrize(("last", "again"), [(1, 0), (2, 3), (3, 3), (8, 3)])
def test_at_its_end_a_run_averages_fragments_again(last: int, again: int) -> None:
    """Those that the last round has averaged before its end: of 4, after 1, 1, 1 and 2 of 2 steps; none of 1 step."""
    sets = ["qsr.averaging.fragments=4"]
    plan = make_plan(VIT, overrides=sets)
    assert plan.recipe is not None
    found = recipe_sizes(plan.recipe, plan.qsr, Size(P), 4)
    early = sum(len(due_fragments(last, step, 4)) for step in range(1, last))
    assert early == again
    assert found.of(Counts("qsr", 100, 0, 10, last)) == 10 * found.averaging + again * found.averaging // 4


@pytest.mark.parametrize(
    ("config", "gradients", "hidden"),
    [
        ({}, 4 * P, False),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, 3 * P, False),
        ({"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 3}}, 2 * P, True),
        ({"fp16": {"enabled": True}, "communication_data_type": "fp32"}, 4 * P, False),
        ({"bf16": {"enabled": False}, "zero_optimization": {"stage": 2, "overlap_comm": True}}, 6 * P, True),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 64, "gradient_accumulation_steps": 8}, 34 * P, False),
        ({"bf16": 3, "zero_optimization": []}, 4 * P, False),
    ],
)
def test_a_deepspeed_configuration(config: dict[str, Any], gradients: int, hidden: bool) -> None:
    found = deepspeed_sizes(config, make_plan(VIT).qsr, Size(P), 2)
    assert (found.averaging, found.gradients) == (4 * P, gradients)
    assert (found.hidden_share > 0) is hidden


def test_a_model_is_counted() -> None:
    """Batch norm's statistics are averaged as well, and small tensors are kept by stage 3."""
    recipe = load_recipe(CONFIGS / "digits-qsr.yaml", ["model={name: timm/resnet10t, kwargs: {num_classes: 10}}"])
    size, assumed = model_size(recipe)
    assert not assumed
    assert 4e6 < size.parameters < 6e6
    assert 0 < size.small < size.parameters
    assert 2000 < size.buffers < KEPT
    plan = make_plan(VIT)
    both = [recipe_sizes(recipe, plan.qsr, Size(size.parameters, 0, buffers), 2) for buffers in (0, size.buffers)]
    assert both[1].averaging - both[0].averaging == 8 * size.buffers
