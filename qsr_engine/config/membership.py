"""The block `qsr.membership`: whether workers may come and go, and what they then expect of one another."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from qsr_engine.config.strict import StrictModel


class MembershipConfig(StrictModel):
    """Who takes part in a run. A name stands for a block with nothing else: `membership: torchft`."""

    way: Literal["fixed", "torchft"] = "fixed"
    """`fixed`: the ranks that a launcher has started, from the first step to the last. `torchft`: every worker is a job
    of its own, and those that are there meet at boundaries: [elastic](elastic.md)"""
    timeout_seconds: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False)] = 10.0
    """of `torchft`: a member that gives no sign of life for so long has left, and an exchange in which nothing comes
    for so long has failed"""
    min_workers: PositiveInt = 1
    """of `torchft`: fewer members than these wait at a boundary until enough are there"""
    grace_seconds: Annotated[float | None, Field(ge=1, le=86400, allow_inf_nan=False)] = None
    """of `torchft`: `null`: a member that lives is waited for at a boundary, however slow it is. A number: for so long
    after the first has come; what a late one did counts at a later boundary: [slow members](elastic.md#slow-members)"""

    @model_validator(mode="before")
    @classmethod
    def _from_a_name(cls, value: Any) -> Any:
        return {"way": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> MembershipConfig:
        for key in _DEFAULTS:
            if self.way == "fixed" and key in self.model_fields_set and getattr(self, key) != _DEFAULTS[key]:
                raise ValueError(
                    f"{key} is {getattr(self, key):g}, and the way 'fixed' does not read it; leave it out, or write "
                    "the way 'torchft'"
                )
        return self

    @property
    def elastic(self) -> bool:
        """Whether workers may come and go."""
        return self.way == "torchft"


_DEFAULTS: dict[str, Any] = {"timeout_seconds": 10.0, "min_workers": 1, "grace_seconds": None}
