"""K workers of many trials in one process, driven by the project's own position, rule and outer step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.frontier.muon import BatchedMuon
from benchmarks.frontier.problems import Batches
from benchmarks.frontier.regression import Regression
from qsr_engine.averaging.buckets import pieces_in_place
from qsr_engine.averaging.outer import Outer
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.local_steps.rounds import Rounds


@dataclass(frozen=True)
class Outcome:
    """Of one run of all trials; seconds are those of one core."""

    errors: list[float]
    averagings: int
    longest: int
    seconds: float


class Workers:
    """The models: row k x trials + t is that of worker k in trial t; under `parallel` a trial has one row."""

    def __init__(self, batches: Batches | Regression, together: bool) -> None:
        self._batches, self._trials = batches, batches.trials
        self._make(batches.start.clone(), {}, 1)
        if not together:
            self.part()

    def _make(self, rows: Tensor, state: dict[str, Tensor], workers: int) -> None:
        self.workers = workers
        self.rows = nn.Parameter(rows)
        self.rows.grad = torch.zeros_like(rows)
        network, kind = self._batches.network, self._batches.problem.optimizer
        self._layers, self._into = network.layers(self.rows.detach()), network.layers(self.rows.grad)
        if kind == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW([self.rows], fused=True)
        elif kind == "muon":
            self.optimizer = BatchedMuon(self.rows, lambda rows: [pair[0] for pair in network.layers(rows)[:-1]])
        else:
            self.optimizer = torch.optim.SGD([self.rows], lr=1.0, momentum=0.9 * (kind == "momentum"), fused=True)
        if state:
            self.optimizer.state[self.rows] = state

    @torch.no_grad()
    def part(self) -> None:
        """Each worker of a trial goes on by itself, with the optimizer state that all had."""
        workers = self._batches.problem.workers
        state = {
            name: value.repeat(workers, 1) if value.ndim else value
            for name, value in self.optimizer.state[self.rows].items()
            if isinstance(value, Tensor)
        }
        self._make(self.rows.detach().repeat(workers, 1), state, workers)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        pixels, targets = (
            values.flatten(0, 1) if self.workers > 1 else values.transpose(0, 1).flatten(1, 2)
            for values in self._batches.next()
        )
        self._batches.network.gradient(self._layers, self._into, pixels, targets)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def mean(self, values: Tensor) -> Tensor:
        """Over the workers, summed in their order and divided once, as an all-reduce does: [trials, size]."""
        return values.detach().view(self.workers, self._trials, -1).sum(0).div_(self.workers)

    @torch.no_grad()
    def put(self, values: Tensor, mean: Tensor) -> None:
        values.detach().view(self.workers, self._trials, -1).copy_(mean)


def train(batches: Batches | Regression, qsr: QSRConfig) -> Outcome:
    """Train every trial to the end by the rule, and test the average."""
    began = time.process_time()
    rows, averagings, longest = end_of(batches, qsr)
    return Outcome(batches.errors(rows), averagings, longest, round(time.process_time() - began, 2))


def end_of(batches: Batches | Regression, qsr: QSRConfig) -> tuple[Tensor, int, int]:
    """The averaged models of all trials at the end [trials, size], averagings, and the steps of the longest round."""
    rounds = Rounds(qsr, lambda: 0.0)
    workers = Workers(batches, rounds.mode == "parallel")
    bucket = batches.start.flatten().clone()
    outer = Outer(qsr.outer, [bucket]) if qsr.outer else None
    averagings = longest = 0
    while not rounds.finished:
        if rounds.mode == "local" and workers.workers == 1:
            workers.part()
            bucket.copy_(workers.mean(workers.rows).flatten())
            if outer:
                outer.begin_round()
        workers.step(rounds.learning_rate)
        rounds.step += 1
        if not rounds.at_end:
            continue
        averagings, longest = averagings + 1, max(longest, rounds.period)
        if rounds.mode == "local":
            bucket.copy_(workers.mean(workers.rows).flatten())
            if outer:
                outer.round_lasted(rounds.units)
                for piece in pieces_in_place([bucket], bucket.nbytes):
                    outer.step(piece)
            workers.put(workers.rows, bucket.view(batches.trials, -1))
            for name in qsr.averaging.states_due(rounds.round):
                held = workers.optimizer.state[workers.rows][name]
                workers.put(held, workers.mean(held))
        if not rounds.finished:
            rounds.begin_next()
    return workers.mean(workers.rows), averagings, longest
