"""The runs of the authors' files, simulated step by step as their code goes, beside the same runs here.

Source: github.com/hmgxr128/QSR at 0ac44f1. `main.py` has the defaults, `recipe/*.yml` come over them and the flags of
`example-run-*.sh` over these; `xscheduler.py` has the rates, `LocalOptimizer` of `localopt.py` the rule, and
`trainer_process.py` the order: after an optimizer step it sets the next step's rate, and then, where the parameters
were averaged, the period. docs/authors.md says the same in words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from configs.imagenet.table import FOLDER, RUNS, overrides
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.planning.plan import Plan, make_plan
from qsr_engine.schedule import learning_rate, rounds


@dataclass(frozen=True)
class Schedule:
    """Flags of theirs that decide the learning rate, with their defaults (max_lr is 0.01)."""

    max_lr: float
    min_lr: float = 1e-6
    scheduler: str = "cosine"
    warmup_epochs: int = 5
    warmup_steps: int | None = None
    epochs_for_sche: int = 300
    steps_per_epoch: int = 312  # in all of their files; -1 by default: as many as the data has
    decay_points: tuple[int, ...] = ()  # no default, and none in their files
    gamma: float = 0.1
    base: float = 2.0

    @property
    def warmup(self) -> int:
        return self.warmup_epochs * self.steps_per_epoch if self.warmup_steps is None else self.warmup_steps

    @property
    def steps(self) -> int:
        return self.epochs_for_sche * self.steps_per_epoch

    def rate(self, step: int) -> float:
        """Of the step that comes after so many steps."""
        if step < self.warmup:
            return self.min_lr + step * (self.max_lr - self.min_lr) / self.warmup
        if self.scheduler == "step":
            epoch = step // self.steps_per_epoch
            return self.max_lr * self.gamma ** sum(epoch >= point for point in self.decay_points)
        decaying = self.steps - self.warmup
        done = min(step - self.warmup, decaying)
        if self.scheduler == "linear":
            return self.min_lr + (decaying - done) * (self.max_lr - self.min_lr) / decaying
        cosine = self.min_lr + 0.5 * (self.max_lr - self.min_lr) * (1 + math.cos(done / decaying * math.pi))
        if self.scheduler == "cosine_step":
            return float(self.base ** round(math.log(cosine) / math.log(self.base)))
        return cosine


@dataclass(frozen=True)
class Run:
    """A run of theirs: the flags that decide its rounds, with their defaults."""

    schedule: Schedule
    local: bool  # optimizer localadamw or localsgd
    epochs: int = 1  # that it goes on for, also after resuming
    alpha: float = 0.0
    init_h: int = 1
    min_h: int = 1
    power: float = 1.0
    resume_from_step: int = 0


class Simulated(NamedTuple):
    rounds: list[tuple[int, int]]  # first step and length of all that were averaged
    steps: int
    not_averaged: int  # steps at the end of the run that no averaging follows


def simulate(run: Run) -> Simulated:
    def period() -> int:
        if not run.local:
            return 1
        if step < run.schedule.warmup or run.alpha == 0:
            return run.init_h
        wanted = int((run.alpha / run.schedule.rate(step)) ** run.power)
        return max(min(max(wanted, run.min_h), run.schedule.steps - step), 1)

    step = start = run.resume_from_step
    found, h = [], period()
    for _ in range(run.epochs * run.schedule.steps_per_epoch):
        step += 1
        if step - start >= h:
            found.append((start, step - start))
            start, h = step, period()
    return Simulated(found, step - run.resume_from_step, step - start)


# The files in their folder recipe/, and the three scripts. Their two files for `step` give no decay points, without
# which their code fails; 30, 60 and 80 of 90 epochs are those of the recipes here.
VIT = Schedule(0.008, warmup_steps=10_000)
RESNET = Schedule(0.8, epochs_for_sche=200)
RESNET_STEP = Schedule(0.8, epochs_for_sche=90, scheduler="step", decay_points=(30, 60, 80))
QSR_RESNET: dict[str, Any] = {"alpha": 0.2, "power": 2, "init_h": 2, "min_h": 2}
THEIRS = {
    "vit-B=4096-adamw-cos.yml": Run(VIT, local=False),  # it says no epochs, so that it is one of 300
    "vit-B=4096-localadamw-cos.yml": Run(Schedule(0.016), local=True, epochs=300),
    "resnet-B=4096-sgdm-cos.yml": Run(RESNET, local=False, epochs=200),
    "resnet-B=4096-localsgdm.yml": Run(RESNET, local=True, epochs=200),
    "resnet-B=4096-sgdm-step.yml": Run(RESNET_STEP, local=False, epochs=90),
    "resnet-B=4096-localsgdm-step.yml": Run(RESNET_STEP, local=True, epochs=90),
    "example-run-vit-adamw.sh": Run(VIT, local=False, epochs=300),
    "example-run-vit-localadamw.sh": Run(VIT, local=True, epochs=300, init_h=4, min_h=4, power=2),
    "example-run-vit-localadamw-resume.sh": Run(
        VIT, local=True, epochs=261, alpha=0.0175, init_h=4, min_h=4, power=2, resume_from_step=40 * 312
    ),
}
# With the rule on, which their files leave off: the paper's settings, as flags.
THEIRS["resnet-B=4096-localsgdm.yml --alpha 0.2"] = replace(THEIRS["resnet-B=4096-localsgdm.yml"], **QSR_RESNET)
THEIRS["example-run-vit-localadamw.sh --alpha 0.0175"] = replace(THEIRS["example-run-vit-localadamw.sh"], alpha=0.0175)

LOCAL_ADAMW_YML = "qsr.h_base=1 qsr.lr.peak=0.016 qsr.lr.warmup_steps=1560 optimizer.weight_decay=0.1"
# What each is here: a run of configs/imagenet and keys to set; averagings and averagings % of the whole run.
OURS: dict[str, tuple[str, str, int, float]] = {
    "vit-B=4096-adamw-cos.yml": ("vit-b", "", 93_600, 100),
    "vit-B=4096-localadamw-cos.yml": ("vit-b-constant-h4", LOCAL_ADAMW_YML, 93_600, 100),
    "resnet-B=4096-sgdm-cos.yml": ("resnet152", "", 62_400, 100),
    "resnet-B=4096-localsgdm.yml": (
        "resnet152-constant-h2",
        "model.name=torchvision/resnet101 qsr.h_base=1",
        62_400,
        100,
    ),
    "resnet-B=4096-sgdm-step.yml": ("resnet152-step", "", 28_080, 100),
    "resnet-B=4096-localsgdm-step.yml": ("resnet152-step-constant-h2", "qsr.h_base=1", 28_080, 100),
    "example-run-vit-adamw.sh": ("vit-b", "", 93_600, 100),
    "example-run-vit-localadamw.sh": ("vit-b-constant-h4", "", 23_400, 25),
    "example-run-vit-localadamw-resume.sh": ("vit-b-qsr-h4", "", 9_711, 10.375),
    "resnet-B=4096-localsgdm.yml --alpha 0.2": ("resnet152-qsr-h2", "", 24_792, 39.731),
    "example-run-vit-localadamw.sh --alpha 0.0175": ("vit-b-qsr-h4", "", 9_711, 10.375),
}


@cache
def plan(name: str, keys: str) -> Plan:
    return make_plan(FOLDER / f"{RUNS[name][0]}.yaml", overrides=[*overrides(name), *keys.split()])


@pytest.mark.parametrize("name", THEIRS)
def test_rounds_and_averagings_are_theirs(name: str) -> None:
    """From where theirs begins to where it ends; of the whole run, as many averagings as are written above."""
    run, (ours, keys, count, percent) = THEIRS[name], OURS[name]
    found, made = simulate(run), plan(ours, keys)
    assert len(made.rounds) == count
    assert 100 * count / made.qsr.total_steps == pytest.approx(percent, abs=5e-4)
    end = min(run.resume_from_step + found.steps, run.schedule.steps)
    expected = [(r.start, r.length) for r in made.rounds if run.resume_from_step <= r.start < end]
    assert expected == [(start, length) for start, length in found.rounds if start < end]
    assert found.not_averaged == 0
    mode = "local" if run.local else "parallel"
    assert {r.mode for r in made.rounds} == {mode}


# A schedule of theirs, and the run here with it.
RATES = {
    "cosine, ViT": (VIT, "vit-b", ""),
    "cosine, vit-B=4096-localadamw-cos.yml": (Schedule(0.016), "vit-b-constant-h4", LOCAL_ADAMW_YML),
    "cosine, ResNet": (RESNET, "resnet152", ""),
    "step": (RESNET_STEP, "resnet152-step", ""),
    "linear": (Schedule(0.8, epochs_for_sche=90, scheduler="linear"), "resnet50-linear", ""),
    "cosine_step": (
        Schedule(0.008, epochs_for_sche=30, warmup_steps=1000, scheduler="cosine_step"),
        "vit-b-step",
        "epochs=30 qsr.lr.warmup_steps=1000",
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_rates_are_theirs(name: str) -> None:
    """But for the last digit of the peak, since pi and the cosine's argument are multiplied in another order."""
    theirs, ours, keys = RATES[name]
    qsr = plan(ours, keys).qsr
    assert qsr.total_steps == theirs.steps
    assert qsr.lr is not None
    corners = [theirs.warmup, *(point * theirs.steps_per_epoch for point in theirs.decay_points), theirs.steps - 1]
    lr, steps = qsr.lr, {*range(0, theirs.steps, 7), *(step + near for step in corners for near in (-1, 0, 1))}
    apart = max(abs(learning_rate(lr, step, theirs.steps) - theirs.rate(step)) for step in steps)
    assert apart <= 4e-16 * theirs.max_lr


def test_every_flag_of_theirs_is_in_the_table() -> None:
    """And the keys that their YAML files alone have."""
    text = (Path(__file__).parents[2] / "docs" / "authors.md").read_text()
    assert [name for name in FLAGS.split() if f"`--{name}`" not in text] == []
    assert "`group_weight" in text
    assert "`warmup`" in text


FLAGS = """
recipe-pth config-pth nw seed local_rank physical-batch-size device epochs epochs-for-sche steps-per-epoch
total-batch-size init-model-by-seed model optimizer max-lr min-lr momentum nesterov wd beta1 beta2 eps scheduler
decay-points gamma warmup-epochs warmup-steps log-pth resume-from-epoch resume-from-step resume-pth
optimizer-resume-pth multiple-optimizers wandb wandb-tags bn bn-batches eval-on-start save-freq save-opt log-per-step
dtype grad-scaler grad-upscale grad-scaler-max-retries grad-scaler-growth-factor grad-scaler-backoff-factor
grad-scaler-growth-interval debug avg-m avg-v base ckpt-to-save alpha init-h min-h power log-each-layer
label-smoothing strong-aug rand-aug-depth rand-aug-severity mixup-alpha gradient-clipping
"""


# ------------------------------------------------------------------------------------------- where theirs differs


def test_their_resumed_run_takes_an_epoch_more() -> None:
    """After epoch 40 it goes on for 261: 312 steps beyond the schedule, at min_lr and averaged one by one."""
    run = THEIRS["example-run-vit-localadamw-resume.sh"]
    found = simulate(run)
    beyond = [(start, length) for start, length in found.rounds if start >= 93_600]
    assert beyond == [(step, 1) for step in range(93_600, 93_912)]
    assert run.schedule.rate(93_911) == pytest.approx(1e-6)
    assert simulate(replace(run, epochs=260)).rounds == found.rounds[:-312]
    assert len(found.rounds) - 312 == 9_711 - 40 * 312 // 4, "and until epoch 40 both have constant H = 4"


def test_a_run_of_constant_h_may_end_without_an_average_there() -> None:
    """Only the rule looks at the steps that are left. Here the last round of every strategy is cut."""
    run = replace(THEIRS["example-run-vit-localadamw.sh"], init_h=7)
    assert simulate(run).not_averaged == 93_600 % 7 == 3
    last = plan("vit-b-constant-h4", "qsr.h_base=7").rounds[-1]
    assert (last.start, last.length) == (93_597, 3)
    partial = replace(THEIRS["example-run-vit-localadamw.sh --alpha 0.0175"], epochs=280)
    assert simulate(partial).not_averaged == 280 * 312 - 85_458, "so does one that is to stop within a round"


def test_their_period_is_one_short_where_rounding_takes_a_whole_number_from_below() -> None:
    """0.2 / (0.8 x 0.1^2) is 25, and in floating point a little less: H = 624 there, and 625 here."""
    theirs = simulate(replace(THEIRS["resnet-B=4096-localsgdm-step.yml"], **QSR_RESNET)).rounds
    ours = [(r.start, r.length) for r in plan("resnet152-step-qsr-h2", "").rounds]
    same = [start for start, _ in theirs if start < 60 * 312]
    assert [start for start, _ in ours if start < 60 * 312] == same
    assert theirs[len(same) :] == [(60 * 312 + 624 * n, 624) for n in range(10)] + [(80 * 312, 3120)]
    assert ours[len(same) :] == [(60 * 312 + 625 * n, 625) for n in range(10)] + [(80 * 312 + 10, 3110)]


def test_a_rate_of_0_at_the_end_is_no_error_here() -> None:
    """After the last averaging theirs divides by the rate that comes next."""
    schedule = replace(VIT, min_lr=0.0, epochs_for_sche=2, warmup_steps=0)
    with pytest.raises(ArithmeticError):
        simulate(Run(schedule, local=True, epochs=2, alpha=0.0175, power=2))
    lr = {"schedule": "cosine", "peak": 0.008, "min": 0.0}
    made = list(rounds(QSRConfig.model_validate({"alpha": 0.0175, "total_steps": 624, "lr": lr})))
    assert made[-1].start + made[-1].length == 624


@pytest.mark.parametrize(("init_h", "last", "next_"), [(3, 9_999, 10_002), (5, 9_995, 10_000)])
def test_the_period_of_the_warm_up_is_one_of_its_own(init_h: int, last: int, next_: int) -> None:
    """--init-h is h_warmup here. The first step of a round decides; step 10,000 is the first after the warm-up."""
    run = replace(THEIRS["example-run-vit-localadamw.sh --alpha 0.0175"], init_h=init_h, epochs=40)
    found = simulate(run).rounds
    made = [(r.start, r.length) for r in plan("vit-b-qsr-h4", f"qsr.h_warmup={init_h}").rounds]
    assert made[: len(found)] == found
    assert (last, init_h) in found
    assert (next_, 4) in found
