"""The `"qsr"` block. `step` always counts optimizer steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qsr_engine.config.averaging import AveragingConfig, OuterConfig
from qsr_engine.config.membership import MembershipConfig
from qsr_engine.config.strict import Count, NonNegative, Positive, PositiveInt, StrictModel


class LearningRateConfig(StrictModel):
    """The learning rate as a function of the step (the formulas are in `schedule.learning_rate`)."""

    schedule: Literal["cosine", "linear", "step", "cosine_step", "constant"]
    """`cosine`, `linear`, `step`, `cosine_step` or `constant`"""
    peak: Positive
    """the largest learning rate"""
    min: NonNegative = 0.0
    """where the warm-up starts, and `cosine` and `linear` end"""
    warmup_steps: Count = 0
    """linear warm-up from min to peak; H is h_warmup for as long"""
    decay_steps: list[PositiveInt] = []
    """of `step`: optimizer steps at which lr is multiplied by factor"""
    factor: Positive = 0.1
    """of `step`"""
    base: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    """of `cosine_step`: lr is the nearest power of base"""

    @property
    def warms_up(self) -> bool:
        return self.warmup_steps > 0

    @model_validator(mode="after")
    def _consistent(self) -> LearningRateConfig:
        if self.min > self.peak:
            raise ValueError(f"min is {self.min} and peak is {self.peak}; write a min that is not above the peak")
        if self.factor > 1:
            raise ValueError(f"factor is {self.factor}; write a factor of at most 1, so that the learning rate decays")
        if self.decay_steps != sorted(set(self.decay_steps)):
            raise ValueError(f"decay_steps is {self.decay_steps}; write strictly increasing steps")
        if self.decay_steps and self.schedule != "step":
            raise ValueError(f"decay_steps is read by the schedule 'step' only, and schedule is {self.schedule!r}")
        for key, default, reader in (("factor", 0.1, "step"), ("base", 2.0, "cosine_step")):
            value = getattr(self, key)
            if value != default and self.schedule != reader:
                raise ValueError(
                    f"{key} is {value:g}, which the schedule {reader!r} reads only, and schedule is "
                    f"{self.schedule!r}; leave it out"
                )
        if self.min and not self.warms_up and self.schedule in ("step", "constant"):
            raise ValueError(
                f"min is {self.min:g}, and the schedule {self.schedule!r} without a warm-up never comes there; leave "
                "it out, or write the length of a warm-up from it"
            )
        return self


class OutlierConfig(StrictModel):
    """A worker that moved much farther than workers do (see `local_steps.outliers`)."""

    z: Positive = 3.0
    """how many standard deviations above its mean the norm of a worker's movement since the last averaging may lie,
    over the median of all workers'. EDiT's is 3, beyond which one in 740 normal deviates lies: write more for many
    workers"""
    then: Literal["leave_out", "clip"] = "leave_out"
    """`leave_out` averages the other workers and gives this one their mean, with that of their optimizer states, as
    `not_finite: leave_out` does; `clip` leaves the worker the part of its movement that is no outlier"""
    after_averagings: PositiveInt = 20
    """the first averagings are learnt from, and nobody is judged"""


class FaultsConfig(StrictModel):
    """What a run does when something goes wrong."""

    timeout_seconds: Annotated[float, Field(ge=1, le=604_800, allow_inf_nan=False)] | None = 600.0
    """a rank that gives no sign of life for so long, or takes no step while it waits for nobody, is lost: the others
    end with an error that names it; before its first step and after its last one, only once others have waited for it
    for so long; six times as long while it writes or reads a checkpoint; `null`: never. Of several engines in a process
    any one's progress is progress"""
    not_finite: Literal["stop", "leave_out"] = "stop"
    """a worker's parameters or averaged buffers are NaN or infinite at a boundary: `stop` ends the run on every rank
    before anything is averaged; `leave_out` averages the other workers and gives it their mean, with that of their
    optimizer states. Not with strategy `parallel` or `overlap: delayed`; before the switch of `post_local` gradients
    are averaged at every step, and a NaN reaches all"""
    outlier: OutlierConfig | None = None
    """`null`: nobody is judged. A block, such as {z: 3, then: clip}: a worker whose movement is an outlier (EDiT) is
    left out of an average, or clipped. One more copy of the parameters in memory. Not with strategy `parallel` or
    `overlap: delayed`"""
    on_signal: Literal["save", "cut_round", "finish_round"] = "save"
    """SIGTERM and SIGUSR1: save at the step of the foremost worker, inside the round, and exit; `finish_round` trains
    to the end of the round first, `cut_round` averages at that step and begins a new round there"""


class QSRConfig(StrictModel):
    """The `"qsr"` block of a DeepSpeed configuration.

    `alpha`, `power` and `h_base` may stay where another strategy is tried, which does not train with them: `qsr plan`
    compares strategies by them. Any other key that the strategy does not read is refused.

    Without an `lr` block the learning rate is read from the optimizer, which the caller's own scheduler sets;
    `warmup_steps` then says how long that scheduler warms up, since the period is h_warmup for as long, and for as long
    as the rate is seen to rise, where it is 0.
    """

    strategy: Literal["qsr", "constant", "parallel", "post_local", "swap"] = "qsr"
    """`qsr`, `constant`, `parallel`, `post_local` or `swap`"""
    h_base: PositiveInt = 1
    """smallest period, and the period of the other strategies"""
    alpha: NonNegative | None = None
    """of `qsr`: H = max(h_base, floor((alpha / lr)^power)). alpha, power and h_base may stay where another strategy is
    tried: `qsr plan` compares strategies by them. Any other key that a strategy does not read is an error"""
    power: Positive = 2.0
    """of `qsr`: 2 is QSR, 1 and 3 are for comparison"""
    h_warmup: PositiveInt | None = None
    """H of `qsr` while the learning rate warms up; without an `lr` block and with `warmup_steps: 0`, while the
    optimizer's rate is seen to rise, or is 0 at step 0; `null`: h_base"""
    h_max: PositiveInt | None = None
    """no round is longer, whatever the strategy (not `parallel`, which has none); `null`: as long as the rule says, and
    the last round of `qsr` and `swap` may be many epochs"""
    switch_step: Count | None = None
    """where `post_local` and `swap` change"""
    total_steps: PositiveInt
    """optimizer steps of the run"""
    lr: LearningRateConfig | None = None
    """`null`: the optimizer's own rate, or your scheduler's. A block: the engine sets the rate, as a function of the
    step"""
    warmup_steps: Count | None = None
    """the warm-up of your own scheduler, where there is no `lr` block"""
    worker_size: PositiveInt = 1
    """ranks in a worker"""
    averaging: AveragingConfig = AveragingConfig()
    """the block is for local steps, and an error with `parallel`"""
    outer: OuterConfig | None = None
    """`null`: the plain average. A block: SGD on the workers' mean movement (SlowMo, DiLoCo: lr 0.7, momentum 0.9,
    nesterov true); lr 1 and momentum 0 are the plain average. Two more copies of the parameters in memory"""
    on_other_workers: Literal["mean", "fresh"] = "mean"
    """where a checkpoint of another number of workers is loaded: every worker's optimizer starts from the `mean` of the
    saved states, or `fresh`"""
    faults: FaultsConfig = FaultsConfig()
    membership: MembershipConfig = MembershipConfig()
    """`fixed` or `torchft`, or a block"""

    @property
    def period_warmup_steps(self) -> int:
        """Steps for which the period stays at h_warmup because the learning rate warms up."""
        return self.lr.warmup_steps if self.lr else self.warmup_steps or 0

    @model_validator(mode="after")
    def _consistent(self) -> QSRConfig:
        if self.strategy == "parallel":
            _check_parallel(self)
        if self.outer is not None and self.averaging.overlap == "delayed":
            raise ValueError(
                "outer is set and averaging.overlap is 'delayed', which leaves the workers at different parameters; "
                "write outer null, or the overlap 'none' or 'next_forward'"
            )
        if self.outer is not None and self.outer.unit_steps is not None:
            _check_unit_steps(self)
        _check_faults(self)
        _check_strategy(self)
        if self.membership.elastic:
            _check_membership(self)
        _check_periods(self)
        _check_steps(self)
        return self


def _check_unit_steps(qsr: QSRConfig) -> None:
    if qsr.lr is None:
        raise ValueError(
            "outer.unit_steps is set and there is no block lr, from which the rates of a round follow; write the "
            "block, or unit_steps null"
        )
    for key, free, why in (("fragments", 1, "boundaries lie inside rounds"), ("mixing", 0.0, "workers never meet")):
        if (value := getattr(qsr.averaging, key)) != free:
            raise ValueError(
                f"outer.unit_steps is set and averaging.{key} is {value}, with which {why}; write {key} {free:g}, or "
                "unit_steps null"
            )


def _check_parallel(qsr: QSRConfig) -> None:
    """The framework averages gradients, by itself and at every step; how parameters are averaged is not read."""
    if qsr.outer is not None:
        raise ValueError("outer is set, and strategy 'parallel' averages no parameters; write null")
    for key in AveragingConfig.model_fields:
        value, default = getattr(qsr.averaging, key), getattr(AveragingConfig(), key)
        if value != default:
            raise ValueError(
                f"averaging.{key} is {value!r}, and strategy 'parallel' averages no parameters; leave the block "
                "averaging out, or write a strategy of local steps such as 'qsr'"
            )


def _check_faults(qsr: QSRConfig) -> None:
    if qsr.faults.not_finite == "leave_out" and qsr.strategy == "parallel":
        raise ValueError(
            "faults.not_finite is 'leave_out', and strategy 'parallel' averages gradients at every step, so that a NaN "
            "of one worker is in all of them; write 'stop', or a strategy of local steps such as 'qsr'"
        )
    if qsr.faults.not_finite == "leave_out" and qsr.averaging.overlap == "delayed":
        raise ValueError(
            "faults.not_finite is 'leave_out' and averaging.overlap is 'delayed', where a worker goes on from its own "
            "parameters until the average comes; write not_finite 'stop', or the overlap 'none' or 'next_forward'"
        )

    if qsr.faults.outlier is not None and qsr.strategy == "parallel":
        raise ValueError(
            "faults.outlier is set, and strategy 'parallel' averages gradients at every step, in which no worker moves "
            "by itself; write null, or a strategy of local steps such as 'qsr'"
        )
    if qsr.faults.outlier is not None and qsr.averaging.overlap == "delayed":
        raise ValueError(
            "faults.outlier is set and averaging.overlap is 'delayed', where a worker goes on from its own parameters "
            "until the average comes; write outlier null, or the overlap 'none' or 'next_forward'"
        )


def _check_membership(qsr: QSRConfig) -> None:
    """Refuse what workers that come and go cannot do, or what was not built for them."""
    averaging, plain = qsr.averaging, AveragingConfig()
    if qsr.strategy == "parallel" or (qsr.strategy == "post_local" and qsr.switch_step):
        until = "" if qsr.strategy == "parallel" else f" before its switch_step ({qsr.switch_step})"
        raise ValueError(
            f"membership is 'torchft', and strategy {qsr.strategy!r} averages gradients at every step{until}, where "
            "every death would be waited for; write a strategy of local steps such as 'qsr', or membership 'fixed'"
        )
    if qsr.lr is None:
        raise ValueError(
            "membership is 'torchft' and there is no lr block: who joins cannot know where another's scheduler stands; "
            "write qsr.lr, a function of the step"
        )
    if qsr.faults.outlier is not None:
        raise ValueError(
            "faults.outlier is given and membership is 'torchft': members do not exchange how far each has moved; "
            "leave it out, or write membership 'fixed'"
        )
    if qsr.faults.on_signal == "cut_round":
        raise ValueError(
            "faults.on_signal is 'cut_round' and membership is 'torchft': a worker that is to stop would wait for the "
            "others to come to their boundary; write 'save' or 'finish_round'"
        )
    for key, why in _NOT_OF_MEMBERS.items():
        if getattr(averaging, key) not in (getattr(plain, key), False):
            raise ValueError(
                f"averaging.{key} is {getattr(averaging, key)!r} and membership is 'torchft': {why}; leave it out, or "
                "write membership 'fixed'"
            )


_NOT_OF_MEMBERS = {  # keys of averaging, and why not
    "two_level": "members are averaged over gloo in one ring, wherever they are",
    "wire_dtype": "members are averaged in fp32, since who joins does not know what differences start from",
    "overlap": "an exchange that fails is repeated at the boundary, before anybody goes on",
    "fragments": "members meet at the end of a round only",
    "mixing": "who joins takes over what all members hold after a boundary",
    "cuda_graph": "a graph holds the addresses of a group, and the group of the members changes",
}


def _check_strategy(qsr: QSRConfig) -> None:
    if qsr.strategy == "qsr" and qsr.alpha is None:
        raise ValueError("alpha is missing, and strategy 'qsr' needs it; write for example 0.0175 (0 is constant H)")
    if qsr.strategy in ("post_local", "swap") and qsr.switch_step is None:
        raise ValueError(
            f"switch_step is missing, and strategy {qsr.strategy!r} needs it; write a step from 0 to total_steps"
        )
    if qsr.strategy not in ("post_local", "swap") and qsr.switch_step is not None:
        raise ValueError(
            f"switch_step is {qsr.switch_step}, and strategy {qsr.strategy!r} does not read it; write null, or one of "
            "the strategies post_local and swap"
        )
    if qsr.strategy != "qsr" and qsr.alpha is None and qsr.power != 2:
        raise ValueError(
            f"power is {qsr.power:g}, and strategy {qsr.strategy!r} does not read it; leave it out, or write the "
            "strategy 'qsr'"
        )
    if qsr.strategy != "qsr" and qsr.lr is None and qsr.warmup_steps:
        raise ValueError(
            f"warmup_steps is {qsr.warmup_steps}, and the periods of strategy {qsr.strategy!r} do not depend on the "
            "learning rate; leave it out, or write the strategy 'qsr'"
        )
    if qsr.lr is not None and qsr.warmup_steps is not None:
        raise ValueError("warmup_steps stands beside an lr block; write it inside: qsr.lr.warmup_steps")
    if qsr.lr is None and qsr.warmup_steps is None and qsr.strategy == "qsr" and (qsr.alpha or qsr.h_warmup):
        raise ValueError(
            "warmup_steps is missing, and there is no lr block: H is h_warmup while your scheduler warms up, and "
            "without its length a warm-up would start with one huge round; write it in steps, 0 for none"
        )


def _check_periods(qsr: QSRConfig) -> None:
    if qsr.h_warmup is not None and qsr.strategy != "qsr":
        raise ValueError(
            f"h_warmup is {qsr.h_warmup}, and strategy {qsr.strategy!r} does not read it; write null, or the strategy "
            "'qsr' (with alpha 0 its period is h_base after the warm-up)"
        )
    if qsr.h_max is not None and qsr.strategy == "parallel":
        raise ValueError(
            f"h_max is {qsr.h_max}, and strategy 'parallel' has no rounds of local steps; write null, or a strategy of "
            "local steps such as 'qsr'"
        )
    for name, value in (("h_base", qsr.h_base), ("h_warmup", qsr.h_warmup or 1)):
        if qsr.h_max is not None and value > qsr.h_max:
            raise ValueError(
                f"{name} is {value} and h_max is {qsr.h_max}, which no round may exceed; write {name} {qsr.h_max} or "
                f"less, or h_max {value} or more"
            )


def _check_steps(qsr: QSRConfig) -> None:
    if qsr.period_warmup_steps > qsr.total_steps:
        path = "lr.warmup_steps" if qsr.lr else "warmup_steps"
        raise ValueError(
            f"{path} is {qsr.period_warmup_steps} and total_steps is {qsr.total_steps}; write a warm-up that ends "
            "within the run"
        )
    if qsr.switch_step is not None and qsr.switch_step > qsr.total_steps:
        raise ValueError(
            f"switch_step is {qsr.switch_step} and total_steps is {qsr.total_steps}; write a step within the run"
        )
