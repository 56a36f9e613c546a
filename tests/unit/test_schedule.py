"""The rule, the learning-rate schedules and the rounds: values by hand, the paper's figures, properties, the oracle."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qsr_engine.config.qsr import LearningRateConfig, QSRConfig
from qsr_engine.config.strict import validate
from qsr_engine.local_steps.rounds import Rounds
from qsr_engine.schedule import Round, averagings_percent, due_fragments, learning_rate, mode, period, rounds
from tests.support import reference


def qsr_config(**block: Any) -> QSRConfig:
    return validate(QSRConfig, {"total_steps": 100, **block}, where="test")


def constant_lr(peak: float, **more: Any) -> dict[str, Any]:
    return {"schedule": "constant", "peak": peak, **more}


VIT_B = {  # ViT-B of the paper: 300 epochs of 312 steps at batch size 4096
    "strategy": "qsr",
    "h_base": 4,
    "alpha": 0.0175,
    "total_steps": 300 * 312,
    "lr": {"schedule": "cosine", "peak": 0.008, "min": 1e-6, "warmup_steps": 10_000},
}


@pytest.mark.parametrize(
    ("h_base", "alpha", "power", "lr", "expected"),
    [
        (1, 0.3, 2.0, 0.1, 9),  # 0.3 / 0.1 is below 3 in floating point
        (1, 0.0175, 2.0, 0.008, 4),  # 2.1875^2 = 4.785
        (4, 0.0175, 2.0, 0.005, 12),  # 3.5^2 = 12.25
        (4, 0.0175, 2.0, 0.0175, 4),  # 1, below h_base
        (2, 0.2, 2.0, 0.8, 2),  # 0.0625
        (2, 0.2, 2.0, 0.08, 6),  # 2.5^2 = 6.25
        (2, 0.2, 1.0, 0.05, 4),  # 4
        (2, 0.2, 1.0, 0.06, 3),  # 3.33
        (2, 0.2, 3.0, 0.1, 8),  # 2^3
        (1, 0.5, 3.0, 0.2, 15),  # 2.5^3 = 15.625
        (3, 0.0, 2.0, 1e-9, 3),  # alpha 0: constant
        (3, 0.1, 2.0, 0.0, 100),  # lr 0: what remains
        (3, 0.1, 2.0, 1e-300, 100),  # the square overflows
        (3, 0.1, 0.5, 1e-3, 10),  # sqrt(100)
        (500, 0.1, 2.0, 1.0, 100),  # h_base above total_steps
    ],
)
def test_period_by_hand(h_base: int, alpha: float, power: float, lr: float, expected: int) -> None:
    qsr = qsr_config(strategy="qsr", h_base=h_base, alpha=alpha, power=power, warmup_steps=0)
    assert period(qsr, 0, lr) == expected


@pytest.mark.parametrize(
    ("lr", "step", "expected"),
    [
        ({"schedule": "cosine", "peak": 1.0, "min": 0.0}, 0, 1.0),
        ({"schedule": "cosine", "peak": 1.0, "min": 0.0}, 25, (1 + math.sqrt(0.5)) / 2),
        ({"schedule": "cosine", "peak": 1.0, "min": 0.2}, 50, 0.6),
        ({"schedule": "cosine", "peak": 1.0, "min": 0.2, "warmup_steps": 10}, 0, 0.2),
        ({"schedule": "cosine", "peak": 1.0, "min": 0.2, "warmup_steps": 10}, 5, 0.6),
        ({"schedule": "cosine", "peak": 1.0, "min": 0.2, "warmup_steps": 10}, 10, 1.0),
        ({"schedule": "cosine", "peak": 1.0, "min": 0.2, "warmup_steps": 10}, 55, 0.6),
        ({"schedule": "linear", "peak": 1.0, "min": 0.0, "warmup_steps": 20}, 40, 0.75),
        ({"schedule": "linear", "peak": 1.0, "min": 0.0, "warmup_steps": 20}, 100, 0.0),
        ({"schedule": "step", "peak": 0.8, "decay_steps": [30, 60]}, 29, 0.8),
        ({"schedule": "step", "peak": 0.8, "decay_steps": [30, 60]}, 30, 0.08),
        ({"schedule": "step", "peak": 0.8, "decay_steps": [30, 60], "factor": 0.5}, 99, 0.2),
        ({"schedule": "cosine_step", "peak": 1.0, "min": 0.0}, 50, 0.5),
        ({"schedule": "cosine_step", "peak": 1.0, "min": 0.0}, 30, 1.0),  # 0.794 is nearer to 1 than to 1/2
        ({"schedule": "cosine_step", "peak": 1.0, "min": 0.0}, 100, 0.0),
        ({"schedule": "constant", "peak": 0.3, "warmup_steps": 10}, 99, 0.3),
        ({"schedule": "cosine", "peak": 1.0, "min": 0.2, "warmup_steps": 100}, 100, 1.0),  # nothing but warm-up
    ],
)
def test_learning_rate_by_hand(lr: dict[str, Any], step: int, expected: float) -> None:
    config = validate(LearningRateConfig, lr, where="test")
    assert learning_rate(config, step, total_steps=100) == pytest.approx(expected, abs=1e-15)


def test_the_papers_vit() -> None:
    found = list(rounds(qsr_config(**VIT_B)))
    assert {r.length for r in found if r.start // 312 == 183} == {29, 30}
    assert found[-1].length == 8142
    assert found[-1].start // 312 == 273
    assert all(r.length == 4 for r in found if r.start < 10_000)
    # Table 2 of the paper gives 10.4 % for QSR with h_base 4.
    assert averagings_percent(found) == pytest.approx(10.4, abs=0.05)


def test_the_papers_vit_with_a_limit() -> None:
    """A run that must survive failures: no round longer than an epoch, and fewer averagings during the warm-up."""
    found = list(rounds(qsr_config(**VIT_B, h_warmup=8, h_max=312)))
    assert all(r.length == 8 for r in found if r.start < 10_000)
    assert {r.length for r in found if r.start // 312 == 183} == {29, 30}
    assert [r.length for r in found[-26:-1]] == [312] * 25


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        # A scheduler that starts at 0, and nobody said for how long it warms up.
        ([0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.2, 0.2], [3, 3, 3, 1, 2]),
        ([0.4] * 6 + [0.2] * 6, [1, 1, 1, 1, 1, 1, 4, 2]),  # none: the rule from the first step on
        ([0.4] * 4 + [0.0] * 8, [1, 1, 1, 1, 8]),  # 0 at the end is no warm-up
        ([0.4, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.4, 0.4, 0.4, 0.4], [1, 1, 3, 1, 1, 1, 1, 1, 1, 1]),  # restarted
    ],
)
def test_while_the_rate_is_seen_to_rise_h_is_h_warmup(rates: list[float], expected: list[int]) -> None:
    """rounds() in advance, and Rounds, which counts steps; also where it is written down and read at every step."""
    qsr = qsr_config(strategy="qsr", alpha=0.4, h_warmup=3, total_steps=12, warmup_steps=0)
    assert [r.length for r in rounds(qsr, rates.__getitem__)] == expected
    position = Rounds(qsr, lambda: rates[0])
    found = []
    while True:
        resumed = Rounds(qsr, lambda: rates[min(position.step, 11)])  # noqa: B023
        resumed.load_state_dict(position.state_dict())
        position = resumed
        position.step += 1
        if position.at_end:
            found.append(position.period)
            if position.finished:
                break
            position.begin_next()
    assert found == expected


def test_strategies_by_hand() -> None:
    lr = constant_lr(0.1)
    assert list(rounds(qsr_config(strategy="constant", h_base=4, total_steps=10, lr=lr))) == [
        Round(0, 4, "local"),
        Round(4, 4, "local"),
        Round(8, 2, "local"),
    ]
    assert list(rounds(qsr_config(strategy="parallel", total_steps=3, lr=lr))) == [
        Round(0, 1, "parallel"),
        Round(1, 1, "parallel"),
        Round(2, 1, "parallel"),
    ]
    assert list(rounds(qsr_config(strategy="post_local", h_base=3, switch_step=2, total_steps=6, lr=lr))) == [
        Round(0, 1, "parallel"),
        Round(1, 1, "parallel"),
        Round(2, 3, "local"),
        Round(5, 1, "local"),
    ]
    swap = {"strategy": "swap", "h_base": 3, "switch_step": 4, "total_steps": 12, "lr": lr}
    assert list(rounds(qsr_config(**swap))) == [
        Round(0, 3, "local"),
        Round(3, 1, "local"),
        Round(4, 8, "local"),
    ]
    assert [r.length for r in rounds(qsr_config(**swap, h_max=5))] == [3, 1, 5, 3]


def test_averagings_percent() -> None:
    lr = constant_lr(0.1)
    assert averagings_percent(rounds(qsr_config(strategy="parallel", lr=lr))) == 100
    assert averagings_percent(rounds(qsr_config(strategy="constant", h_base=4, lr=lr))) == 25
    assert averagings_percent(rounds(qsr_config(strategy="post_local", h_base=5, switch_step=50, lr=lr))) == 60


def test_one_step_is_one_round() -> None:
    for strategy in ("constant", "parallel", "qsr"):
        block = {"alpha": 0.1} if strategy == "qsr" else {}
        found = list(rounds(qsr_config(strategy=strategy, h_base=7, total_steps=1, lr=constant_lr(0.1), **block)))
        assert [(r.start, r.length) for r in found] == [(0, 1)]


def test_a_round_that_cannot_start_is_refused() -> None:
    qsr = qsr_config(strategy="constant", h_base=4, lr=constant_lr(0.1))
    with pytest.raises(ValueError, match="no round starts at step 100"):
        period(qsr, 100, 0.1)
    for wrong in (-0.1, math.nan):
        with pytest.raises(ValueError, match="learning rate of step 3"):
            period(qsr, 3, wrong)
    with pytest.raises(ValueError, match="no lr block"):
        next(rounds(qsr_config(strategy="constant")))


# Values that a person would write, so that exact decimal arithmetic and floating point must agree.
decimals = st.decimals(min_value="0.001", max_value="2", places=3).map(float)


@st.composite
def blocks(draw: st.DrawFn) -> dict[str, Any]:
    total = draw(st.integers(1, 400))
    peak = draw(decimals)
    lr: dict[str, Any] = {
        "schedule": draw(st.sampled_from(["cosine", "linear", "step", "cosine_step", "constant"])),
        "peak": peak,
        "min": draw(st.sampled_from([0.0, peak / 8, peak])),
        "warmup_steps": draw(st.integers(0, total)),
    }
    if lr["schedule"] == "step":
        lr["decay_steps"] = sorted(draw(st.sets(st.integers(1, 400), max_size=4)))
        lr["factor"] = draw(st.sampled_from([0.1, 0.5, 1.0]))
    if lr["schedule"] in ("step", "constant") and not lr["warmup_steps"]:
        lr["min"] = 0.0
    block: dict[str, Any] = {
        "strategy": draw(st.sampled_from(["qsr", "constant", "parallel", "post_local", "swap"])),
        "h_base": draw(st.integers(1, 40) | st.integers(1, 600)),
        "alpha": draw(st.just(0.0) | decimals),
        "power": draw(st.sampled_from([1.0, 2.0, 3.0])),
        "total_steps": total,
        "lr": lr,
    }
    if block["strategy"] in ("post_local", "swap"):
        block["switch_step"] = draw(st.integers(0, total))
    if block["strategy"] == "qsr":
        block["h_warmup"] = draw(st.none() | st.integers(1, 40))
    if block["strategy"] != "parallel":
        block["h_max"] = draw(st.none() | st.integers(max(block["h_base"], block.get("h_warmup") or 1), 700))
    return block


@given(blocks())
def test_rounds_cover_every_step_once_and_end_at_the_end(block: dict[str, Any]) -> None:
    found = list(rounds(qsr_config(**block)))
    assert [step for r in found for step in range(r.start, r.start + r.length)] == list(range(block["total_steps"]))
    assert all(r.length >= 1 for r in found)


EXACTLY_3 = {  # at step 33 lr is 1/3000, which no float is, and alpha / lr is 3
    "strategy": "qsr",
    "alpha": 0.001,
    "power": 1.0,
    "total_steps": 43,
    "lr": {"schedule": "linear", "peak": 0.001, "min": 0.000125, "warmup_steps": 1},
}


@given(blocks())
@example(EXACTLY_3)
def test_rounds_equal_the_slow_simulation(block: dict[str, Any]) -> None:
    slow = reference.boundaries(block)
    assert [(r.start + r.length, r.mode) for r in rounds(qsr_config(**block))] == slow


@given(blocks(), st.integers(0, 400))
def test_learning_rate_equals_the_slow_formula(block: dict[str, Any], step: int) -> None:
    step = min(step, block["total_steps"] - 1)
    config = qsr_config(**block)
    assert config.lr is not None
    fast = learning_rate(config.lr, step, block["total_steps"])
    exact = float(reference.exact_learning_rate(block["lr"], step, block["total_steps"]))
    # Near the end of a cosine, 1 + cos cancels: an error of one rounding is 2^-53 of the peak.
    assert fast == pytest.approx(exact, rel=1e-12, abs=1e-15 * config.lr.peak)
    assert fast == pytest.approx(reference.learning_rate(block["lr"], step, block["total_steps"]), rel=1e-12)


@given(blocks())
def test_the_period_never_falls_while_the_learning_rate_falls(block: dict[str, Any]) -> None:
    block = {**block, "strategy": "qsr"}
    block.pop("switch_step", None)
    qsr = qsr_config(**block)
    assert qsr.lr is not None
    found = [r for r in rounds(qsr) if r.start >= qsr.lr.warmup_steps]
    for before, after in pairwise(found[:-1]):  # the last round is cut
        assert after.length >= before.length


@given(blocks())
def test_warm_up_takes_h_warmup(block: dict[str, Any]) -> None:
    block = {**block, "strategy": "qsr"}
    block.pop("switch_step", None)
    qsr = qsr_config(**block)
    for r in rounds(qsr):
        if r.start < qsr.period_warmup_steps:
            assert r.length == min(qsr.h_warmup or qsr.h_base, qsr.total_steps - r.start)


@given(blocks())
def test_no_round_is_longer_than_h_max(block: dict[str, Any]) -> None:
    qsr = qsr_config(**block)
    assert max(r.length for r in rounds(qsr)) <= (qsr.h_max or qsr.total_steps)


@given(blocks(), st.integers(0, 399))
def test_mode_is_the_rounds_mode(block: dict[str, Any], step: int) -> None:
    qsr = qsr_config(**block)
    step = min(step, qsr.total_steps - 1)
    assert [r.mode for r in rounds(qsr) if r.start <= step < r.start + r.length] == [mode(qsr, step)]


# ------------------------------------------------------------------------------------------------------- fragments


@pytest.mark.parametrize(
    ("length", "fragments", "expected"),
    [
        (6, 2, {3: (0,), 6: (1,)}),  # torchft's golden histories
        (4, 3, {1: (0,), 2: (1,), 4: (2,)}),
        (2, 4, {1: (0, 1, 2), 2: (3,)}),  # floor(2 / 4) is 0: not before the first step
        (1, 3, {1: (0, 1, 2)}),
        (5, 1, {5: (0,)}),
    ],
)
def test_when_a_fragment_is_due(length: int, fragments: int, expected: dict[int, tuple[int, ...]]) -> None:
    found = {taken: due_fragments(length, taken, fragments) for taken in range(1, length + 1)}
    assert {taken: due for taken, due in found.items() if due} == expected


@given(st.integers(1, 300), st.integers(1, 40))
def test_every_fragment_is_due_once_a_round_and_the_last_at_its_end(length: int, fragments: int) -> None:
    due = [p for taken in range(1, length + 1) for p in due_fragments(length, taken, fragments)]
    assert due == [*range(fragments)]
    assert fragments - 1 in due_fragments(length, length, fragments)


def test_everything_is_due_where_the_run_ends_or_a_round_is_cut() -> None:
    lr = {"schedule": "constant", "peak": 0.1}
    mine = Rounds(qsr_config(strategy="constant", h_base=4, total_steps=10, lr=lr, averaging={"fragments": 3}), float)
    seen = []
    while not mine.finished:
        mine.step += 1
        if mine.step == 6:
            mine.cut()
        seen.append((mine.step, mine.due, mine.ends_whole))
        if mine.at_end and not mine.finished:
            mine.begin_next()
    everything = (0, 1, 2)
    assert seen == [
        *[(1, (0,), False), (2, (1,), False), (3, (), False), (4, (2,), False)],
        *[(5, (0,), False), (6, everything, True)],  # of H 4
        *[(7, (0,), False), (8, (1,), False), (9, (), False), (10, everything, True)],
    ]


def test_steps_that_average_gradients_have_no_fragments() -> None:
    lr = {"schedule": "constant", "peak": 0.1}
    block = {"strategy": "post_local", "h_base": 2, "switch_step": 1, "total_steps": 5, "lr": lr}
    mine = Rounds(qsr_config(**block, averaging={"fragments": 2}), float)
    mine.step, due = 1, []
    due.append(mine.due)
    mine.begin_next()
    mine.step = 2
    assert [*due, mine.due] == [(), (0,)]
