"""What a run costs in seconds and bytes: a model of step times, links and stragglers, as pure functions.

It is a model, and these are its assumptions:

    compute        all workers take the same time for a step on average, or differ by `worker_cv`; a step's time is a
                   lognormal draw, independent of every other
    parallel       waits for the slowest worker at every step. Gradients travel while the backward pass runs; those of
                   the last bucket are ready only when it ends
    local steps    wait for the slowest worker once a round, by when the workers' draws have averaged out. The
                   averaging comes after it
    an all-reduce  sends 2 (n - 1) / n of its payload from every worker and is as slow as the slowest link, plus one
                   latency for each message that must wait for another. A host's port sends and receives at full rate
                   at once, and the network between ports is never the limit
    all else       (data loading, evaluation, checkpoints) costs nothing

`qsr plan` has less: steps, averagings and what one of each costs. Here is what that leaves out.

Sources: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009), for the
ring; Fenton, "The sum of log-normal probability distributions" (1960), for sums of step times.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from qsr_engine.planning.cost import BUCKET_BYTES, HIDDEN_BY_BACKWARD
from qsr_engine.schedule import Round

LARGEST_CV = 100.0  # of step times; beyond it, squares and exponentials leave the range of floats


@dataclass(frozen=True)
class Network:
    """The links between workers.

    Args:
        bandwidth: bytes/s that a host's port sends, and receives at the same time; math.inf for no limit.
        latency: seconds, one way, of a message between hosts.
        workers_per_host: so many share a port; the last host may hold fewer.
        local_bandwidth: bytes/s of a worker inside a host.
        efficiency: share of both bandwidths that an all-reduce reaches.
        two_level: reduced inside the host first, then between hosts, then told inside the host; otherwise one ring
            over all workers, host after host.
        local_latency: seconds, one way, of a message inside a host.
    Raises:
        ValueError: a figure is out of range.
    """

    bandwidth: float
    latency: float = 0.0
    workers_per_host: int = 1
    local_bandwidth: float = math.inf
    efficiency: float = 1.0
    two_level: bool = False
    local_latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("bandwidth", "local_bandwidth"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "bytes/s above 0, or math.inf for no limit")
        for name in ("latency", "local_latency"):
            _check(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "seconds, 0 or more")
        _check(self.workers_per_host >= 1, "workers_per_host", self.workers_per_host, "1 or more")
        _check(0 < self.efficiency < math.inf, "efficiency", self.efficiency, "a share above 0, such as 0.8")

    def hosts(self, workers: int) -> int:
        return -(-workers // self.workers_per_host)

    def bytes_sent(self, payload: float, workers: int) -> float:
        """Bytes that a worker sends in one all-reduce of payload bytes; two levels add up to as many as one ring."""
        return 2 * (workers - 1) / workers * payload

    def port_bytes(self, payload: float, workers: int) -> float:
        """Bytes that the port of a host sends in one all-reduce of payload bytes."""
        hosts = self.hosts(workers)
        if hosts == 1:
            return 0.0
        ends = hosts if self.two_level else workers
        return 2 * (ends - 1) / ends * payload

    def all_reduce_seconds(self, payload: float, workers: int) -> float:
        """Seconds of one all-reduce of payload bytes that all workers begin together."""
        hosts, local = self.hosts(workers), min(self.workers_per_host, workers)
        between = self.port_bytes(payload, workers) / (self.bandwidth * self.efficiency)
        inside_rate = self.local_bandwidth * self.efficiency
        inside = 2 * (local - 1) / local * payload / inside_rate
        if self.two_level:
            delays = 2 * (hosts - 1) * self.latency + 2 * (local - 1) * self.local_latency
            return between + inside + delays
        if local > 1:  # every link of the one ring carries the same, those inside hosts too
            inside = self.bytes_sent(payload, workers) / inside_rate
        slowest_link = self.local_latency if hosts == 1 else max(self.latency, self.local_latency * (local > 1))
        return max(between, inside) + 2 * (workers - 1) * slowest_link


@dataclass(frozen=True)
class StepTime:
    """How long the compute of an optimizer step takes.

    Args:
        mean: seconds of one step of one worker, over all workers and steps.
        cv: standard deviation over mean of one worker's steps, which are independent lognormal draws.
        worker_cv: standard deviation over mean of the workers' own means; a slow machine stays slow throughout.
    Raises:
        ValueError: a figure is out of range.
    """

    mean: float
    cv: float = 0.0
    worker_cv: float = 0.0

    def __post_init__(self) -> None:
        _check(0 < self.mean < math.inf, "mean", self.mean, "seconds above 0")
        for name in ("cv", "worker_cv"):
            right = 0 <= getattr(self, name) <= LARGEST_CV
            _check(right, name, getattr(self, name), f"0 to {LARGEST_CV:g}, such as 0.05 for 5 %")

    def slowest(self, workers: int, steps: int) -> float:
        """Expected time, in seconds, until the slowest of so many workers has taken so many steps.

        A worker's time is its own mean, times a sum of independent lognormal draws. That sum is taken for a lognormal
        of the same mean and variance (Fenton, Wilkinson), and the product of two lognormals is one again. What remains
        is the expected maximum of n equal lognormals, which _largest() integrates.
        """
        if steps == 0:
            return 0.0
        variance = math.log1p(self.cv**2 / steps) + math.log1p(self.worker_cv**2)  # of the logarithm
        return self.mean * steps * _largest(workers, math.sqrt(variance))


@lru_cache(maxsize=1 << 16)
def _largest(n: int, sigma: float) -> float:
    """Expected maximum of n lognormal draws of mean 1, whose logarithms have the standard deviation sigma.

    With density phi and distribution Phi of a standard normal z, it is the integral of
    exp(sigma z - sigma^2 / 2) n phi(z) Phi(z)^(n - 1), and exp(sigma z - sigma^2 / 2) phi(z) is phi(z - sigma). The
    trapezoidal rule is exact to rounding for such a function, smooth and nothing at both ends.
    """
    if n == 1 or sigma == 0:
        return 1.0
    low, high, points = -9.0, 9.0 + sigma, 600
    width = (high - low) / points
    total = 0.0
    for index in range(points + 1):
        z = low + index * width
        below = 0.5 * math.erfc(-z / math.sqrt(2))
        total += math.exp(-0.5 * (z - sigma) ** 2) * below ** (n - 1)
    return n * total * width / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Cost:
    """Seconds of an average worker, and bytes that it sends to others.

    Args:
        compute: of its steps.
        communication: that it waits for, beyond what is hidden behind compute.
        waiting: for slower workers.
    """

    compute: float = 0.0
    communication: float = 0.0
    waiting: float = 0.0
    bytes: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.waiting

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.compute + other.compute,
            self.communication + other.communication,
            self.waiting + other.waiting,
            self.bytes + other.bytes,
        )

    def times(self, count: int) -> Cost:
        return Cost(self.compute * count, self.communication * count, self.waiting * count, self.bytes * count)


@dataclass(frozen=True)
class CostModel:
    """What rounds cost.

    Args:
        parameter_bytes: payload of one averaging.
        gradient_bytes: payload of one step of `parallel`.
        backward_share: of a step, while which gradients of `parallel` can travel; 0 where they travel after it.
        bucket_bytes: of gradients that travel together; the last of them are ready when the backward pass ends.
    Raises:
        ValueError: a figure is out of range.
    """

    step: StepTime
    network: Network
    workers: int
    parameter_bytes: float
    gradient_bytes: float
    backward_share: float = HIDDEN_BY_BACKWARD
    bucket_bytes: float = BUCKET_BYTES

    def __post_init__(self) -> None:
        _check(self.workers >= 1, "workers", self.workers, "1 or more")
        for name in ("parameter_bytes", "gradient_bytes", "bucket_bytes"):
            _check(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        _check(0 <= self.backward_share <= 1, "backward_share", self.backward_share, "a share from 0 to 1")

    def round(self, round_: Round) -> Cost:
        """Cost of one round with its boundary."""
        compute = round_.length * self.step.mean
        waiting = self.step.slowest(self.workers, round_.length) - compute
        if round_.mode == "parallel":
            sent = self.network.bytes_sent(self.gradient_bytes, self.workers)
            seconds = self.network.all_reduce_seconds(self.gradient_bytes, self.workers)
            last_bucket = self.network.all_reduce_seconds(min(self.bucket_bytes, self.gradient_bytes), self.workers)
            hidden = self.backward_share * self.step.mean
            return Cost(compute, max(last_bucket, seconds - hidden) if hidden else seconds, waiting, sent)
        averaging = self.network.all_reduce_seconds(self.parameter_bytes, self.workers)
        return Cost(compute, averaging, waiting, self.network.bytes_sent(self.parameter_bytes, self.workers))

    def run(self, rounds: Iterable[Round]) -> Cost:
        """Cost of all rounds of a run; those of one length and mode are computed once."""
        total = Cost()
        for (length, mode), count in Counter((r.length, r.mode) for r in rounds).items():
            total += self.round(Round(0, length, mode)).times(count)
        return total


def _check(right: bool, name: str, found: object, write: str) -> None:
    if not right:
        raise ValueError(f"{name} is {found!r}; write {write}")
