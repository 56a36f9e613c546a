"""What a run costs in seconds and bytes: a model of step times, links and stragglers, as pure functions.

It is a model, and these are its assumptions:

    compute        all workers take the same time for a step on average, or differ by `worker_cv`; a step's time is a
                   lognormal draw, independent of every other
    parallel       waits for the slowest worker at every step. Gradients travel while the backward pass runs; those of
                   the last bucket are ready only when it ends
    local steps    wait for the slowest worker once a round, by when the workers' draws have averaged out. The
                   averaging comes after it, or in part behind the next forward
    an all-reduce  sends 2 (n - 1) / n of its payload from every worker and is as slow as the slowest link, plus one
                   latency for each message that must wait for another. A host's port sends and receives at full rate
                   at once, and the network between ports is never the limit
    all else       (data loading, evaluation, checkpoints) costs nothing

Sources: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009), for the
ring; Sanders, Speck, Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan" (2009), for the
tree, as NCCL has it; Fenton, "The sum of log-normal probability distributions" (1960), for sums of step times; Gu et
al. (arXiv 2310.14423), Appendix F, for the fit from two runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

from qsr_engine.schedule import Mode, Round

HIDDEN_BY_BACKWARD = 2 / 3  # of a step: a backward pass computes twice what a forward does
HIDDEN_BY_FORWARD = 1 / 3
LARGEST_CV = 100.0  # of step times; beyond it, squares and exponentials leave the range of floats


@dataclass(frozen=True)
class Network:
    """The links between workers.

    Args:
        bandwidth: bytes/s that a host's port sends, and receives at the same time; math.inf for no limit.
        latency: seconds, one way, of a message between hosts.
        workers_per_host: so many share a port; the last host may hold fewer.
        local_bandwidth: bytes/s of a worker inside a host.
        algorithm: "ring" or "tree" (two binary trees, pipelined, between hosts; a chain inside a host).
        efficiency: share of both bandwidths that an all-reduce reaches.
        two_level: reduced inside the host first, then between hosts (by `algorithm`), then told inside the host;
            otherwise one ring over all workers, host after host, or the tree.
        local_latency: seconds, one way, of a message inside a host.
    Raises:
        ValueError: a figure is out of range.
    """

    bandwidth: float
    latency: float = 0.0
    workers_per_host: int = 1
    local_bandwidth: float = math.inf
    algorithm: Literal["ring", "tree"] = "ring"
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
        _check(self.algorithm in ("ring", "tree"), "algorithm", self.algorithm, "'ring' or 'tree'")

    def hosts(self, workers: int) -> int:
        return -(-workers // self.workers_per_host)

    def bytes_sent(self, payload: float, workers: int) -> float:
        """Bytes that a worker sends in one all-reduce of payload bytes; for the tree, on average over workers.

        The same for all algorithms here: a ring sends (n - 1) / n of the payload twice, the two trees have n - 1
        edges each, which carry half of the payload up and down, and two levels add up to as much.
        """
        return 2 * (workers - 1) / workers * payload

    def port_bytes(self, payload: float, workers: int) -> float:
        """Bytes that the port of a host sends in one all-reduce of payload bytes."""
        hosts = self.hosts(workers)
        if hosts == 1:
            return 0.0
        ends = workers if self.algorithm == "ring" and not self.two_level else hosts
        return 2 * (ends - 1) / ends * payload

    def all_reduce_seconds(self, payload: float, workers: int) -> float:
        """Seconds of one all-reduce of payload bytes that all workers begin together."""
        hosts, local = self.hosts(workers), min(self.workers_per_host, workers)
        between = self.port_bytes(payload, workers) / (self.bandwidth * self.efficiency)
        inside_rate = self.local_bandwidth * self.efficiency
        inside = 2 * (local - 1) / local * payload / inside_rate
        delays = self._messages(hosts) * self.latency
        if self.two_level:
            return between + inside + delays + 2 * (local - 1) * self.local_latency
        if self.algorithm == "tree":  # pipelined, so the slower of the two links sets the pace
            return max(between, inside) + delays + 2 * (local - 1) * self.local_latency
        if local > 1:  # every link of the one ring carries the same, those inside hosts too
            inside = self.bytes_sent(payload, workers) / inside_rate
        slowest_link = self.local_latency if hosts == 1 else max(self.latency, self.local_latency * (local > 1))
        return max(between, inside) + 2 * (workers - 1) * slowest_link

    def _messages(self, ends: int) -> int:
        """How many messages between so many hosts wait for one another."""
        return 2 * (ends - 1) if self.algorithm == "ring" else 2 * math.ceil(math.log2(ends))


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

    @property
    def communication_share(self) -> float:
        """Of the total time, from 0 to 1."""
        return self.communication / self.total if self.total else 0.0

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
        forward_share: of a step, behind which an averaging travels: about 1/3 for the overlap next_forward, d for
            `delayed` by d steps, 0 for none. The last averaging of a run hides behind nothing.
        boundary_seconds: fixed cost of a boundary: header, checks.
        bucket_bytes: of gradients that travel together; the last of them are ready when the backward pass ends.
        gradient_efficiency: rate of an all-reduce of gradients over that of an averaging, where they go other ways.
    Raises:
        ValueError: a figure is out of range.
    """

    step: StepTime
    network: Network
    workers: int
    parameter_bytes: float
    gradient_bytes: float
    backward_share: float = HIDDEN_BY_BACKWARD
    forward_share: float = 0.0
    boundary_seconds: float = 0.0
    bucket_bytes: float = 25e6  # as in PyTorch's DistributedDataParallel
    gradient_efficiency: float = 1.0

    def __post_init__(self) -> None:
        _check(self.workers >= 1, "workers", self.workers, "1 or more")
        for name in ("parameter_bytes", "gradient_bytes", "forward_share", "boundary_seconds", "bucket_bytes"):
            _check(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
        _check(
            0 < self.gradient_efficiency < math.inf, "gradient_efficiency", self.gradient_efficiency, "a share above 0"
        )
        _check(0 <= self.backward_share <= 1, "backward_share", self.backward_share, "a share from 0 to 1")

    def averaging_seconds(self) -> float:
        """Of one averaging that hides behind nothing, without the fixed cost of a boundary."""
        return self.network.all_reduce_seconds(self.parameter_bytes, self.workers)

    def round(self, round_: Round, *, last: bool = False) -> Cost:
        """Cost of one round with its boundary.

        Args:
            last: it ends the run, so that nothing runs after its averaging.
        """
        compute = round_.length * self.step.mean
        waiting = self.step.slowest(self.workers, round_.length) - compute
        if round_.mode == "parallel":
            sent = self.network.bytes_sent(self.gradient_bytes, self.workers)
            return Cost(compute, self._exposed_gradients(), waiting, sent)
        # The next round is about as long as this one, and a delayed averaging ends within it.
        hidden = 0.0 if last else min(self.forward_share, round_.length) * self.step.mean
        exposed = max(0.0, self.averaging_seconds() - hidden) + self.boundary_seconds
        return Cost(compute, exposed, waiting, self.network.bytes_sent(self.parameter_bytes, self.workers))

    def _exposed_gradients(self) -> float:
        seconds = self._gradient_seconds(self.gradient_bytes)
        if not self.backward_share:
            return seconds
        last_bucket = self._gradient_seconds(min(self.bucket_bytes, self.gradient_bytes))
        return max(last_bucket, seconds - self.backward_share * self.step.mean)

    def _gradient_seconds(self, payload: float) -> float:
        return self.network.all_reduce_seconds(payload / self.gradient_efficiency, self.workers)

    def run(self, rounds: Iterable[Round] | Tally) -> Cost:
        """Cost of all rounds of a run, in their order."""
        return _sum(rounds, self.round)


@dataclass(frozen=True)
class Tally:
    """The rounds of a run, counted: those of one length and mode cost the same.

    Args:
        counts: (length, mode) -> how many, the last round left out.
        last: the round that ends the run; None where there is none.
    """

    counts: Mapping[tuple[int, Mode], int]
    last: Round | None

    @property
    def rounds(self) -> int:
        return sum(self.counts.values()) + (self.last is not None)

    @property
    def steps(self) -> int:
        return sum(length * count for (length, _), count in self.counts.items()) + (
            self.last.length if self.last else 0
        )


def tally(rounds: Iterable[Round]) -> Tally:
    """Count rounds, so that what they cost is computed once for each kind."""
    counts: Counter[tuple[int, Mode]] = Counter()
    last = None
    for round_ in rounds:
        if last is not None:
            counts[last.length, last.mode] += 1
        last = round_
    return Tally(counts, last)


class _RoundCost(Protocol):
    def __call__(self, round_: Round, *, last: bool = False) -> Cost: ...


def _sum(rounds: Iterable[Round] | Tally, cost: _RoundCost) -> Cost:
    counted = rounds if isinstance(rounds, Tally) else tally(rounds)
    total = Cost() if counted.last is None else cost(counted.last, last=True)
    for (length, mode), count in counted.counts.items():
        total += cost(Round(0, length, mode)).times(count)
    return total


@dataclass(frozen=True)
class Fit:
    """Compute of a step and cost of an averaging, in seconds, found from two finished runs.

    Everything else that happened in these runs is in one or the other: what comes with every step (data, logging) in
    step_seconds, what comes with every boundary (waiting for the slowest, headers) in averaging_seconds.
    """

    step_seconds: float
    averaging_seconds: float
    averaging_bytes: float = 0.0  # that a worker sends in one averaging; 0 where it is not known

    def round(self, round_: Round, *, last: bool = False) -> Cost:
        """Cost of one round; one of `parallel` is one step and one averaging."""
        return Cost(round_.length * self.step_seconds, self.averaging_seconds, 0.0, self.averaging_bytes)

    def run(self, rounds: Iterable[Round] | Tally) -> Cost:
        """Cost of all rounds of a run."""
        return _sum(rounds, self.round)


@dataclass(frozen=True)
class Observed:
    """What a finished run tells a fit: optimizer steps, averagings, and seconds of training in all."""

    steps: int
    averagings: int
    seconds: float


def fit_two_runs(first: Observed, second: Observed) -> Fit:
    """Solve seconds = steps x (compute of a step) + averagings x (cost of an averaging) for two runs.

    Raises:
        ValueError: the runs average equally often for their steps, or their times make a cost negative.
    """
    determinant = first.steps * second.averagings - second.steps * first.averagings
    if determinant == 0:
        raise ValueError(
            f"both runs average {first.averagings} times in {first.steps} steps, so that nothing tells compute from "
            "averaging; give runs of different periods"
        )
    averaging = (first.steps * second.seconds - second.steps * first.seconds) / determinant
    step = (first.seconds * second.averagings - second.seconds * first.averagings) / determinant
    if averaging < 0 or step <= 0:
        raise ValueError(
            f"{first.averagings} averagings in {first.steps} steps took {first.seconds:g} s, and {second.averagings} "
            f"in {second.steps} took {second.seconds:g} s: that makes {averaging:g} s an averaging and {step:g} s a "
            "step; give runs in which more averagings took more time"
        )
    return Fit(step, averaging)


def smallest_period(share: Callable[[int], float], limit: float, largest: int) -> int | None:
    """The smallest h_base from 1 to largest for which share(h_base) <= limit; None where there is none.

    share must fall as h_base grows. It may rise a little where the last round is cut differently; the answer then
    holds what is asked, and one a little smaller might too.
    """
    if share(largest) > limit:
        return None
    low, high = 0, 1
    while high < largest and share(high) > limit:
        low, high = high, min(2 * high, largest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= limit else (middle, high)
    return high


def _check(right: bool, name: str, found: object, write: str) -> None:
    if not right:
        raise ValueError(f"{name} is {found!r}; write {write}")
