"""One row of what a run tells: what training costs and reaches, and what every worker did; no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One row of training metrics.

    In `metrics.jsonl` null stands for None, and also for a number that is not finite, which JSON cannot say: a null
    loss is a loss that diverged. TensorBoard gets such a number as it is.

    The three times are wall-clock seconds since training began, evaluation excluded, and add up to all of it.
    """

    step: int  # optimizer steps done
    images_seen: int  # samples, over all workers
    round: int
    period: int  # H of the round that this step belongs to
    lr: float
    loss: float  # mean over this rank's steps since the last record; the rank is rank 0
    averagings: int  # so far
    bytes_sent: float  # per rank, so far: a ring all-reduce over n ranks sends 2 (n - 1) / n of its payload
    communication_percent: float  # bytes sent so far, in % of what `parallel` would have sent
    seconds_compute: float
    seconds_averaging: float | None  # None where it cannot be told apart from compute, which then holds it
    seconds_data: float  # waiting for data
    images_per_second: float  # over all workers, since the last record
    relative_distance: float | None = None  # RMS over workers of ||x_k - mean|| / ||mean|| before the last averaging
    eval_accuracy: float | None = None  # %; None where this record has no evaluation
    eval_loss: float | None = None  # None likewise
    sharpness: float | None = None  # largest eigenvalue of the loss's Hessian at the average; None likewise
    data_percent: float | None = None  # of the time since the last record: rank 0 waited for data
    skipped_samples: int = 0  # bad samples that rank 0 has skipped so far
    checkpoints_failed: int = 0  # that could not be written, so far
    skipped_steps: int = 0  # updates skipped after an overflow, over all workers, as of the last boundary
    left_out: int = 0  # times so far that a worker's parameters were not finite and it was left out of an average

    def scalars(self) -> dict[str, float]:
        """What a tracker draws over the step, by its tag."""
        return {tag: value for tag, name in TAGS.items() if (value := getattr(self, name)) is not None}


TAGS = {
    "train/loss": "loss",
    "train/lr": "lr",
    "local_steps/period": "period",
    "local_steps/round": "round",
    "local_steps/relative_distance": "relative_distance",
    "local_steps/skipped_steps": "skipped_steps",
    "checkpoints/failed": "checkpoints_failed",
    "local_steps/left_out": "left_out",
    "communication/averagings": "averagings",
    "communication/bytes_sent": "bytes_sent",
    "communication/percent_of_parallel": "communication_percent",
    "time/compute_seconds": "seconds_compute",
    "time/averaging_seconds": "seconds_averaging",
    "time/data_seconds": "seconds_data",
    "data/waiting_percent": "data_percent",
    "data/skipped_samples": "skipped_samples",
    "throughput/images_per_second": "images_per_second",
    "throughput/images_seen": "images_seen",
    "eval/accuracy": "eval_accuracy",
    "eval/loss": "eval_loss",
    "eval/sharpness": "sharpness",
}
"""The tag of every field of a record, as TensorBoard shows it; the x axis is `step`."""


@dataclass(frozen=True)
class WorkersRecord:
    """What every worker did since the last such record: a list has one number a worker, in their order.

    Gathered at a boundary, so nobody waits for it elsewhere. Of a worker of several ranks: the mean over its ranks, and
    the sum of their skipped samples. Times are wall-clock seconds, evaluation and checkpoints excluded.
    """

    step: int  # optimizer steps done
    seconds: list[float]  # that passed
    loss: list[float]
    seconds_data: list[float]  # waiting for data
    seconds_waiting: list[float] | None  # at boundaries, for the last to come; None without local steps
    skipped_samples: list[int]  # so far

    def scalars(self) -> dict[str, float]:
        """What a tracker draws: the range over the workers, and each by itself where there are not too many."""
        curves = {"loss": self.loss, "data_percent": _percent(self.seconds_data, self.seconds)}
        if self.seconds_waiting is not None:
            curves["waiting_percent"] = _percent(self.seconds_waiting, self.seconds)
        drawn: dict[str, float] = {}
        for name, values in curves.items():
            drawn |= {f"workers/{name}_min": min(values), f"workers/{name}_max": max(values)}
            if len(values) <= _WORKERS_SHOWN:
                drawn |= {f"workers_{name}/{worker}": value for worker, value in enumerate(values)}
        return drawn


_WORKERS_SHOWN = 32


def _percent(parts: list[float], wholes: list[float]) -> list[float]:
    return [100 * part / max(1e-9, whole) for part, whole in zip(parts, wholes, strict=True)]
