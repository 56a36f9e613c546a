"""Which keys of a resolved recipe may differ between two runs that belong together, and in what way they do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

# "resume": a run goes on with another value. "branch": a run that begins from another one's checkpoint has no other
# setting. "fit": a step and an averaging cost the same.
Use = Literal["resume", "branch", "fit"]
_EVERY = frozenset({"resume", "branch", "fit"})
_MACHINES, _FIT = frozenset({"resume"}), frozenset({"fit"})

# By the beginnings of keys.
_TABLE: dict[str, frozenset[str]] = {
    # Where things are, how often something is written, how far the run goes.
    "data.shards": _EVERY,
    "data.cache_": _EVERY,
    "data.max_bad_samples": _EVERY,
    "data.retr": _EVERY,
    "logging.": _EVERY,
    "stop_at_": _EVERY,
    "data.loader_processes": frozenset({"resume", "branch"}),
    "data.loader_threads": frozenset({"resume", "branch"}),
    # What another number of ranks, or another machine, needs.
    "qsr.worker_size": _MACHINES,
    "qsr.on_other_workers": frozenset({"resume", "fit"}),
    "qsr.faults.": _MACHINES,
    "qsr.membership.": _MACHINES,
    "batch.train_micro_batch_size_per_gpu": _MACHINES,
    "batch.gradient_accumulation_steps": _MACHINES,
    "batch.on_other_ranks": _MACHINES,
    "precision.": _MACHINES,
    "fsdp.": _MACHINES,
    # What is computed, at no other cost.
    "data.train_samples": _FIT,
    "data.eval": _FIT,
    "data.shuffle": _FIT,
    "data.mixup": _FIT,
    "seed": _FIT,
    "epochs": _FIT,
    "label_smoothing": _FIT,
    "batch_norm": _FIT,
    **dict.fromkeys((f"optimizer.{key}" for key in ("weight_decay", "betas", "eps", "momentum")), _FIT),
    **dict.fromkeys(
        (
            f"qsr.{key}"
            for key in ("strategy", "h_base", "alpha", "power", "h_warmup", "h_max", "switch_", "total_steps", "lr.")
        ),
        _FIT,
    ),
}


def that_matter(differences: Iterable[tuple[str, Any, Any]], use: Use) -> list[tuple[str, Any, Any]]:
    """Of differences as config.digest finds them, those that may not be, or that are told."""
    free = tuple(prefix for prefix, uses in _TABLE.items() if use in uses)
    return [found for found in differences if not found[0].startswith(free)]
