"""The `"qsr"` block. `step` always counts optimizer steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qsr_engine.config.strict import Count, NonNegative, Positive, PositiveInt, StrictModel


class LearningRateConfig(StrictModel):
    """The learning rate as a function of the step (the formulas are in `schedule.learning_rate`)."""

    schedule: Literal["cosine", "linear", "step", "cosine_step", "constant"]
    peak: Positive
    min: NonNegative = 0.0
    warmup_steps: Count = 0
    decay_steps: list[PositiveInt] = []  # schedule "step": optimizer steps at which lr is multiplied by factor
    factor: Positive = 0.1  # schedule "step"
    base: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0  # schedule "cosine_step": lr is a power of base

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
        return self


class AveragingConfig(StrictModel):
    """How parameters are averaged at a boundary."""

    # Size of a bucket in MB (1e6 bytes), at least 100 bytes; None: the default of the backend.
    bucket_mb: Annotated[float, Field(ge=1e-4, allow_inf_nan=False)] | None = None
    shared_memory: bool = True  # on CPUs: average in shared memory where all ranks of a group are on one host
    # Inside every host first, then between hosts. auto: where ranks on CPUs share memory on several hosts with the same
    # number of them each; true: also by collectives, on GPUs or without shared memory.
    two_level: Literal["auto", True, False] = "auto"
    wire_dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    overlap: Literal["none", "next_forward", "delayed"] = "none"
    delay_steps: PositiveInt | None = None  # overlap "delayed": steps between the snapshot and its average
    cuda_graph: bool = False
    state: list[str] = []  # names of optimizer state that is averaged with the parameters, such as exp_avg
    buffers: Literal["average", "local"] = "average"  # floating-point buffers, such as batch-norm statistics

    @model_validator(mode="after")
    def _consistent(self) -> AveragingConfig:
        if self.overlap == "delayed" and self.delay_steps is None:
            raise ValueError("delay_steps is missing, and overlap 'delayed' needs it; write for example 1")
        if self.overlap != "delayed" and self.delay_steps is not None:
            raise ValueError(
                f"delay_steps is {self.delay_steps}, and overlap {self.overlap!r} does not read it; write null, or the "
                "overlap 'delayed'"
            )
        if self.overlap == "delayed" and self.wire_dtype != "fp32":
            raise ValueError(
                f"wire_dtype is {self.wire_dtype!r} and overlap is 'delayed': after a delayed averaging no two workers "
                "hold the same parameters, from which differences could be sent; write wire_dtype 'fp32', or the "
                "overlap 'next_forward'"
            )
        if self.overlap == "delayed" and self.state:
            raise ValueError(
                f"state is {self.state!r} and overlap is 'delayed': the state would be averaged steps before the "
                "parameters that it belongs to; write state [], or the overlap 'none' or 'next_forward'"
            )
        if self.cuda_graph and (self.overlap != "none" or self.wire_dtype != "fp32"):
            raise ValueError(
                f"cuda_graph is true, overlap is {self.overlap!r} and wire_dtype is {self.wire_dtype!r}; a graph holds "
                "the plain averaging only, so write overlap 'none' and wire_dtype 'fp32', or cuda_graph false"
            )
        if self.two_level is True and (self.cuda_graph or self.overlap == "delayed" or self.wire_dtype != "fp32"):
            raise ValueError(
                f"two_level is true, wire_dtype is {self.wire_dtype!r}, overlap is {self.overlap!r} and cuda_graph is "
                f"{str(self.cuda_graph).lower()}; the two levels average the parameters themselves, and at once, "
                "so write wire_dtype 'fp32', overlap 'none' or 'next_forward' and cuda_graph false, or two_level 'auto'"
            )
        return self


class OuterConfig(StrictModel):
    """The outer optimizer: SGD on the workers' mean movement (see `averaging.outer`)."""

    lr: Positive = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False

    @property
    def is_plain_average(self) -> bool:
        """Whether it gives the average itself."""
        return self.lr == 1 and self.momentum == 0

    @model_validator(mode="after")
    def _consistent(self) -> OuterConfig:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is true and momentum is 0; write a momentum such as 0.9, or nesterov false")
        return self


class FaultsConfig(StrictModel):
    """What a run does when something goes wrong."""

    # After so many seconds without a sign of life, or without progress while others wait for it, a rank is lost, and
    # every other rank ends with an error that names it; None: never.
    timeout_seconds: Annotated[float, Field(ge=1, le=604_800, allow_inf_nan=False)] | None = 600.0
    # A worker whose parameters, or buffers that are averaged, are not finite at a boundary ends the run; or it is left
    # out of this average, and gets that of the others with the mean of their optimizer states. Where gradients are
    # averaged at every step (`post_local` before its switch) a NaN reaches all workers, and the run ends either way.
    not_finite: Literal["stop", "leave_out"] = "stop"
    # On SIGTERM or SIGUSR1: train to the end of the round, or end the round at the step that the foremost worker has
    # reached; then save and exit.
    on_signal: Literal["finish_round", "cut_round"] = "finish_round"


class QSRConfig(StrictModel):
    """The `"qsr"` block of a DeepSpeed configuration.

    `alpha` and `power` are read by the strategy `qsr` only; `h_base` by every strategy but `parallel`. Without an
    `lr` block the learning rate is read from the optimizer, which the caller's own scheduler sets; `warmup_steps`
    then says how long that scheduler warms up, since the period is h_base for as long.
    """

    strategy: Literal["qsr", "constant", "parallel", "post_local", "swap"] = "qsr"
    h_base: PositiveInt = 1
    alpha: NonNegative | None = None
    power: Positive = 2.0
    switch_step: Count | None = None
    total_steps: PositiveInt
    lr: LearningRateConfig | None = None
    warmup_steps: Count | None = None
    worker_size: PositiveInt = 1
    averaging: AveragingConfig = AveragingConfig()
    outer: OuterConfig | None = None  # None: the plain average, as in the paper
    # From a checkpoint of another number of workers: every optimizer starts from the mean of their states, or anew.
    on_other_workers: Literal["mean", "fresh"] = "mean"
    faults: FaultsConfig = FaultsConfig()

    @property
    def period_warmup_steps(self) -> int:
        """Steps for which the period stays at h_base because the learning rate warms up."""
        return self.lr.warmup_steps if self.lr else self.warmup_steps or 0

    @model_validator(mode="after")
    def _consistent(self) -> QSRConfig:
        if self.outer is not None and self.strategy == "parallel":
            raise ValueError("outer is set, and strategy 'parallel' averages no parameters; write null")
        if self.outer is not None and self.averaging.overlap == "delayed":
            raise ValueError(
                "outer is set and averaging.overlap is 'delayed', which leaves the workers at different parameters; "
                "write outer null, or the overlap 'none' or 'next_forward'"
            )
        _check_faults(self)
        _check_strategy(self)
        _check_steps(self)
        return self


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
    if qsr.lr is not None and qsr.warmup_steps is not None:
        raise ValueError("warmup_steps stands beside an lr block; write it inside: qsr.lr.warmup_steps")
    if qsr.lr is None and qsr.warmup_steps is None and qsr.strategy == "qsr" and qsr.alpha:
        raise ValueError(
            "warmup_steps is missing, and there is no lr block: H is h_base while your scheduler warms up, and without "
            "its length a warm-up would start with one huge round; write it in steps, 0 for none"
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
