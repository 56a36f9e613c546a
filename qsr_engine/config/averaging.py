"""The blocks `qsr.averaging` and `qsr.outer`: how what the workers hold becomes one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qsr_engine.config.strict import Positive, PositiveInt, StrictModel


class AveragingConfig(StrictModel):
    """How parameters are averaged at a boundary."""

    bucket_mb: Annotated[float, Field(ge=1e-4, allow_inf_nan=False)] | None = None
    """size of a bucket in 1e6 bytes, at least 1e-4; `null`: 16 on gloo, which was measured, and 64 on NCCL, which was
    not"""
    shared_memory: bool = True
    """on CPUs, where all ranks that average with one another are on one host: average in shared memory instead of
    through gloo. A process forked from a rank then sees its parameters change"""
    two_level: Literal["auto", True, False] = "auto"
    """average inside every host first, then between hosts. `auto`: on CPUs, where the ranks of each host share memory
    and every one of several hosts has the same number, at least 2, of the ranks that average with one another;
    otherwise flat. `true`: also by collectives, on GPUs or with `shared_memory: false`, and an error where the ranks
    are placed otherwise. `false`: flat"""
    wire_dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    """what travels: `fp32`, or the differences from the last average in `bf16`, `fp16` or `int8`, which takes one more
    copy of the parameters (`int8` two)"""
    overlap: Literal["none", "next_forward", "delayed"] = "none"
    """`next_forward`: average while the next forward begins, the same numbers; `delayed`: average while `delay_steps`
    further steps are taken, another algorithm and one more copy of the parameters"""
    delay_steps: PositiveInt | None = None
    """of `delayed`: steps from the boundary until its average takes effect, at the latest at the next boundary"""
    fragments: PositiveInt = 1
    """the parameters are averaged in so many parts, by layers, each at a step of its own within a round: number p, from
    0, of P after floor((p + 1) H / P) steps. Another algorithm: [fragments](fragments.md). Not with `cuda_graph` nor
    `state`"""
    mixing: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """from 0 to 1: what a worker keeps of its own parameters at a boundary, mixing x own + (1 - mixing) x averaged.
    Another algorithm; the run ends with the average all the same"""
    cuda_graph: bool = False
    """NCCL only: capture the averaging once and replay it"""
    state: list[str] | dict[str, PositiveInt] = []
    """names of optimizer state that is averaged with the parameters, in fp32 and before anything else goes on:
    `[exp_avg]` or `[exp_avg, exp_avg_sq]` of Adam, `[momentum_buffer]` of SGD. `{exp_avg: 3, exp_avg_sq: 6}`: at the
    end of every third round, and of every sixth (DES-LOC). `[]` leaves it to each worker, as in the paper"""
    buffers: Literal["average", "local"] = "average"
    """persistent floating-point buffers (batch-norm statistics): `average` them at boundaries, where all ranks must
    have the same ones, or leave them `local`"""

    @field_validator("state", mode="before")
    @classmethod
    def _names_or_periods(cls, state: Any) -> Any:
        numbers = state.values() if isinstance(state, dict) else ()
        named = isinstance(state, list | dict) and all(isinstance(name, str) for name in state)
        if not named or not all(type(number) is int and 0 < number < 2**63 for number in numbers):
            raise ValueError(
                f"found {state!r}; write names of optimizer state, such as [exp_avg], or how many rounds lie between "
                "two averagings of each, such as {exp_avg: 3, exp_avg_sq: 6}"
            )
        return state

    @property
    def state_periods(self) -> dict[str, int]:
        """Name of each state that is averaged: every so many rounds."""
        return self.state if isinstance(self.state, dict) else dict.fromkeys(self.state, 1)

    def states_due(self, number: int) -> list[str]:
        """Names of the states to average at the end of round `number`, which counts from 0."""
        return [name for name, period in self.state_periods.items() if (number + 1) % period == 0]

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
        if self.fragments > 1 and (self.cuda_graph or self.state):
            key, value, why, free = (
                ("cuda_graph", "true", "one graph holds the averaging of all parameters", "false")
                if self.cuda_graph
                else ("state", repr(self.state), "the state of all parameters would be averaged at once", "[]")
            )
            raise ValueError(
                f"fragments is {self.fragments} and {key} is {value}, and {why}; write {key} {free}, or fragments 1"
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
    """of the outer SGD"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """of the outer SGD"""
    nesterov: bool = False
    """of the outer SGD"""
    unit_steps: PositiveInt | None = None
    """`null`: every round has this lr and momentum, whatever its length. A number: they are those of a round of so many
    steps at `lr.peak`; one in which the learning rates add up to p times as much has momentum^p and 1 - (1 - lr)^p.
    Needs the block `lr` and an outer lr of at most 1, with momentum 0 below 1; not with `averaging.fragments` or
    `mixing`"""

    @property
    def is_plain_average(self) -> bool:
        """Whether it gives the average itself."""
        return self.lr == 1 and self.momentum == 0

    @model_validator(mode="after")
    def _consistent(self) -> OuterConfig:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov is true and momentum is 0; write a momentum such as 0.9, or nesterov false")
        if self.unit_steps is not None and self.is_plain_average:
            raise ValueError(
                f"unit_steps is {self.unit_steps}, lr is 1 and momentum is 0: the plain average, whatever a round's "
                "length; write the lr and momentum of a round of so many steps such as 0.7 and 0.9, or unit_steps null"
            )
        if self.unit_steps is not None and self.lr > 1:
            raise ValueError(
                f"unit_steps is {self.unit_steps} and lr is {self.lr:g}: in a round p times as long lr becomes "
                "1 - (1 - lr)^p, which needs an lr of at most 1; write one, or unit_steps null"
            )
        return self
