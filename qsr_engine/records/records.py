"""One row of what a run tells: what training costs and reaches, and what every worker did; no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One row of training metrics.

    In `metrics.jsonl` null stands for None, and also for a number that is not finite, which JSON cannot say: a null
    loss after step 0 is a loss that diverged. TensorBoard gets such a number as it is.

    The three times are wall-clock seconds since training began, evaluation excluded, and add up to all of it.
    """

    step: int  # optimizer steps done
    images_seen: int | None  # over all workers; None of a text
    round: int
    period: int  # H of the round that this step belongs to
    lr: float
    loss: float | None  # mean over this rank's steps since the last record; the rank is rank 0. None before training
    averagings: int  # so far
    averagings_percent: float  # averagings over steps, so far: the paper's relative communication
    communication_percent: float  # its old name
    bytes_sent: float  # that have left a worker so far: see local_steps.traffic
    bytes_percent: float  # the same in % of what would have left it under `parallel`
    seconds_compute: float
    seconds_averaging: float | None  # None where it cannot be told apart from compute, which then holds it
    seconds_data: float  # waiting for data
    images_per_second: float | None  # over all workers, since the last record; None before training, and of a text
    relative_distance: float | None = None  # RMS over workers of ||x_k - mean|| / ||mean|| before the last averaging
    eval_accuracy: float | None = None  # top-1, in %; None where this record has no evaluation
    eval_top5_accuracy: float | None = None  # %; None likewise, and where a model has 5 scores or fewer
    eval_loss: float | None = None  # None likewise
    best_accuracy: float | None = None  # highest eval_accuracy so far; None likewise
    best_step: int | None = None  # the first one with it; None likewise
    tokens_seen: int | None = None  # over all workers; this and the following are of a text, and None of images
    tokens_per_second: float | None = None  # over all workers, since the last record; None before training
    eval_perplexity: float | None = None  # exp(eval_loss), of a token; None where this record has no evaluation
    eval_bits_per_byte: float | None = None  # eval_loss in bits, over the bytes of a token; None likewise
    best_loss: float | None = None  # lowest eval_loss so far; best_step is the first one with it; None likewise
    sharpness: float | None = None  # largest eigenvalue of the loss's Hessian at the average; None likewise
    data_percent: float | None = None  # of the time since the last record: rank 0 waited for data
    skipped_samples: int = 0  # bad samples that rank 0 has skipped so far
    checkpoints_failed: int = 0  # that could not be written, so far
    skipped_steps: int = 0  # updates skipped after an overflow, over all workers, as of the last boundary
    left_out: int = 0  # times so far that a worker was left out of an average: not finite, or an outlier
    clipped: int = 0  # times so far that a worker's movement was an outlier and was clipped
    late: int = 0  # movements so far that came late to an average (membership.grace_seconds)
    largest_z: float | None = None  # of the workers' movements at the last averaging; None where none was judged
    train_accuracy: float | None = None  # %, of the samples that `loss` is of, in training mode; None before training
    loss_scale: float | None = None  # after this step; None where nothing scales the loss
    # L2 norms of rank 0's worker at this step's update, before an averaging; None where they were not measured, and
    # where the optimizer keeps no such state.
    gradient_norm: float | None = None  # before clipping, without the loss scale
    parameter_norm: float | None = None  # of the fp32 masters, after the update
    exp_avg_norm: float | None = None  # AdamW's m
    exp_avg_sq_norm: float | None = None  # AdamW's v
    momentum_buffer_norm: float | None = None  # SGD's

    def scalars(self) -> dict[str, float]:
        """What a tracker draws over the step, by its tag."""
        return {tag: value for tag, name in TAGS.items() if (value := getattr(self, name)) is not None}


TAGS = {
    "train/loss": "loss",
    "train/accuracy": "train_accuracy",
    "train/lr": "lr",
    "train/loss_scale": "loss_scale",
    "local_steps/period": "period",
    "local_steps/round": "round",
    "local_steps/relative_distance": "relative_distance",
    "local_steps/skipped_steps": "skipped_steps",
    "checkpoints/failed": "checkpoints_failed",
    "local_steps/left_out": "left_out",
    "local_steps/clipped": "clipped",
    "local_steps/late": "late",
    "local_steps/largest_z": "largest_z",
    "communication/averagings": "averagings",
    "communication/bytes_sent": "bytes_sent",
    "communication/averagings_percent": "averagings_percent",
    "communication/bytes_percent": "bytes_percent",
    "time/compute_seconds": "seconds_compute",
    "time/averaging_seconds": "seconds_averaging",
    "time/data_seconds": "seconds_data",
    "data/waiting_percent": "data_percent",
    "data/skipped_samples": "skipped_samples",
    "throughput/images_per_second": "images_per_second",
    "throughput/images_seen": "images_seen",
    "throughput/tokens_per_second": "tokens_per_second",
    "throughput/tokens_seen": "tokens_seen",
    "eval/accuracy": "eval_accuracy",
    "eval/top5_accuracy": "eval_top5_accuracy",
    "eval/loss": "eval_loss",
    "eval/perplexity": "eval_perplexity",
    "eval/bits_per_byte": "eval_bits_per_byte",
    "eval/best_loss": "best_loss",
    "eval/best_accuracy": "best_accuracy",
    "eval/best_step": "best_step",
    "eval/sharpness": "sharpness",
    "norms/gradient": "gradient_norm",
    "norms/parameters": "parameter_norm",
    "norms/exp_avg": "exp_avg_norm",
    "norms/exp_avg_sq": "exp_avg_sq_norm",
    "norms/momentum_buffer": "momentum_buffer_norm",
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
    accuracy: list[float] | None = None  # %, of the training samples that `loss` is of; None in older runs

    def scalars(self) -> dict[str, float]:
        """What a tracker draws: mean and range over the workers."""
        drawn: dict[str, float] = {}
        for name, values in self._curves().items():
            drawn |= {
                f"workers/{name}_min": min(values),
                f"workers/{name}_mean": sum(values) / len(values),
                f"workers/{name}_max": max(values),
            }
        return drawn

    def of_each(self) -> list[dict[str, float]]:
        """What it draws of each worker by itself; nothing where there are too many."""
        if len(self.loss) > _WORKERS_SHOWN:
            return []
        curves = self._curves()
        return [{f"worker/{name}": curves[name][worker] for name in curves} for worker in range(len(self.loss))]

    def _curves(self) -> dict[str, list[float]]:
        curves = {"loss": self.loss, "data_percent": _percent(self.seconds_data, self.seconds)}
        if self.accuracy is not None:
            curves["accuracy"] = self.accuracy
        if self.seconds_waiting is not None:
            curves["waiting_percent"] = _percent(self.seconds_waiting, self.seconds)
        return curves


_WORKERS_SHOWN = 32


def _percent(parts: list[float], wholes: list[float]) -> list[float]:
    return [100 * part / max(1e-9, whole) for part, whole in zip(parts, wholes, strict=True)]
