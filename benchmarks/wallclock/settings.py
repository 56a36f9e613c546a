"""The runs that are compared, and what is computed from the times of one launch of them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.planning.cost import HIDDEN_BY_BACKWARD, Costs, Observed, beyond_hidden, count, fit_two_runs
from qsr_engine.schedule import Round, rounds

STEPS = 24
GRADIENT_STEPS = 6  # of `parallel` and `ddp`
IMAGE = 64
MODELS: dict[str, dict[str, Any]] = {
    "vit": {
        "name": "vit_tiny_patch16_224",
        "options": {"img_size": IMAGE, "patch_size": 8, "depth": 4, "num_classes": 100},
        "batch": 24,
    },
    "resnet": {
        "name": "resnet18",
        "options": {"layers": [1, 1, 1, 1], "channels": [48, 96, 192, 384], "num_classes": 100},
        "batch": 36,
    },
}
LR: dict[str, Any] = {"schedule": "cosine", "peak": 1e-3, "min": 1e-6, "warmup_steps": 2}
# By default 16 MB, more than these models have: the first layer would wait for all of it.
BEHIND = {"overlap": "next_forward", "bucket_mb": 1}
LOCAL: dict[str, dict[str, Any]] = {
    "alone": {"strategy": "constant", "h_base": STEPS},
    "constant 4": {"strategy": "constant", "h_base": 4},
    "constant 12": {"strategy": "constant", "h_base": 12},
    "qsr": {"strategy": "qsr", "h_base": 4, "alpha": 2e-3},
    "qsr, behind": {"strategy": "qsr", "h_base": 4, "alpha": 2e-3, "averaging": BEHIND},
    "qsr, bf16": {"strategy": "qsr", "h_base": 4, "alpha": 2e-3, "averaging": {"wire_dtype": "bf16"}},
    "qsr, bf16 behind": {"strategy": "qsr", "h_base": 4, "alpha": 2e-3, "averaging": {**BEHIND, "wire_dtype": "bf16"}},
    "qsr, delayed": {
        "strategy": "qsr",
        "h_base": 4,
        "alpha": 2e-3,
        "averaging": {"overlap": "delayed", "delay_steps": 1, "bucket_mb": 1},
    },
}
GRADIENTS = ("parallel", "ddp")
DDP_BUCKET_MB = 2  # by default 25, more than these models have: nothing would travel beside the backward


def qsr_block(strategy: str) -> dict[str, Any]:
    """The configuration's block of a strategy."""
    if strategy in GRADIENTS:
        return {"strategy": "parallel", "total_steps": GRADIENT_STEPS, "lr": LR}
    return {**LOCAL[strategy], "total_steps": STEPS, "lr": LR}


def rounds_of(strategy: str) -> list[Round]:
    """All rounds of a whole run; of parallel and ddp, of as many steps as the others have."""
    return list(rounds(QSRConfig(**{**qsr_block(strategy), "total_steps": STEPS})))


def foretold(strategy: str, step_seconds: float, averaging_seconds: float, payload: float) -> float:
    """Seconds of a whole run by the cost model, from the figures of its setting.

    Args:
        payload: bytes of an averaging, and of the gradients of a step.
    """
    hidden = HIDDEN_BY_BACKWARD * step_seconds if strategy == "ddp" else 0.0
    gradients = beyond_hidden(averaging_seconds, hidden, DDP_BUCKET_MB * 2**20 / payload)
    run = count(str(qsr_block(strategy)["strategy"]), rounds_of(strategy))
    return Costs(step_seconds, averaging_seconds, gradients).of(run).total


@dataclass(frozen=True)
class Setting:
    """One launch's runs of one model, and what the cost model is given of them."""

    hosts: int
    rate: str
    model: str
    ranks: list[dict[str, dict[str, Any]]]  # a rank: strategy -> its figures

    def slowest(self, strategy: str) -> float:
        """Seconds of the run on the slowest rank; of parallel and ddp, of a whole run at their pace."""
        runs = [rank[strategy] for rank in self.ranks]
        return STEPS * float(max(float(run["seconds"]) / run["steps"] for run in runs))

    def mean(self, strategy: str, figure: str) -> float:
        """Of one figure of a run, over the ranks."""
        return statistics.mean(float(rank[strategy][figure]) for rank in self.ranks)

    def step_seconds(self) -> float:
        """Mean compute of a step of `alone`, on the slowest rank."""
        return float(max(statistics.mean(rank["alone"]["compute"]) for rank in self.ranks))

    @property
    def payload(self) -> int:
        return int(self.ranks[0]["alone"]["parameter_bytes"])

    def averaging_seconds(self) -> float:
        """Of the timed all-reduces, on the slowest rank."""
        timed = zip(*(rank["ddp"]["all_reduce"] for rank in self.ranks), strict=True)
        return float(statistics.median(max(times) for times in timed))

    def foretold(self, strategy: str) -> float:
        """Seconds of a whole run by the cost model."""
        return foretold(strategy, self.step_seconds(), self.averaging_seconds(), self.payload)

    def split(self, first: str, second: str) -> tuple[float, float]:
        """(compute of a step, cost of an averaging) in seconds, from the total times of two runs."""
        pair = [Observed(STEPS, len(rounds_of(name)), self.slowest(name)) for name in (first, second)]
        try:
            fit = fit_two_runs(*pair)
        except ValueError:  # noise of more than the averagings cost
            return math.nan, math.nan
        return fit.step_seconds, fit.averaging_seconds

    def direct(self, strategy: str) -> tuple[float, float]:
        """The same by the clock around each step and around each boundary."""
        compute = statistics.mean(sum(rank[strategy]["compute"]) for rank in self.ranks)
        waiting, averaging = self.mean(strategy, "waiting"), self.mean(strategy, "averaging")
        return (compute + waiting) / STEPS, (averaging - waiting) / self.mean(strategy, "averagings")

    def port_ratio(self, strategy: str) -> float:
        """Bytes that the hosts' ports sent / bytes computed."""
        return self.mean(strategy, "port") / self.mean(strategy, "computed")

    def as_runs(self) -> list[dict[str, Any]]:
        """One entry a run, as benchmarks.scale --validate reads them."""
        bandwidth = 2 * (self.hosts - 1) / self.hosts * self.payload / self.averaging_seconds()
        return [
            {
                "model": f"{self.model}, {strategy}, {self.rate}",
                "strategy": qsr_block(strategy)["strategy"],
                "workers": self.hosts,
                "bandwidth": bandwidth,
                "steps": STEPS,
                "rounds": [round_.length for round_ in rounds_of(strategy)],
                "parameter_bytes": self.payload,
                "step_seconds": self.step_seconds(),
                "step_cv": 0.0,
                "seconds": self.slowest(strategy),
            }
            for strategy in (*LOCAL, *GRADIENTS)
        ]
