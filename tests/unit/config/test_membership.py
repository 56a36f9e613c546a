"""`qsr.membership`: how it is spelled, and what workers that come and go cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from qsr_engine.config.qsr import QSRConfig
from qsr_engine.config.strict import ConfigError, validate

LR = {"schedule": "cosine", "peak": 0.008, "warmup_steps": 10}
BLOCK: dict[str, Any] = {"h_base": 4, "alpha": 0.0175, "total_steps": 100, "lr": LR}


def made(**changes: Any) -> QSRConfig:
    return validate(QSRConfig, {**BLOCK, **changes}, where="ds.json", prefix="qsr.")


def test_a_name_stands_for_a_block() -> None:
    assert made(membership="torchft").membership == made(membership={"way": "torchft"}).membership
    assert made(membership="torchft").membership.elastic
    assert not made().membership.elastic
    assert made(**{**made(membership="torchft").model_dump(exclude_none=True)}).membership.elastic  # as a rank reads it


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"membership": "torch"}, ["qsr.membership.way: found 'torch'", "'fixed' or 'torchft'"]),
        ({"membership": {"min_worker": 2}}, ["qsr.membership.min_worker: unknown key", "'min_workers'"]),
        ({"membership": {"way": "torchft", "timeout_seconds": 0.1}}, ["qsr.membership.timeout_seconds: found 0.1"]),
        ({"membership": {"min_workers": 3}}, ["min_workers is 3, and the way 'fixed' does not read it"]),
        ({"membership": {"way": "torchft", "grace_seconds": 0}}, ["qsr.membership.grace_seconds: found 0"]),
        ({"membership": {"way": "torchft", "grace_seconds": -1}}, ["qsr.membership.grace_seconds: found -1"]),
        # Members ask every 0.3 s, and within a tenth of a second the lighthouse would never see all of them.
        ({"membership": {"way": "torchft", "grace_seconds": 0.1}}, ["grace_seconds: found 0.1", "equal to 1"]),
        ({"membership": {"grace_seconds": 3}}, ["grace_seconds is 3, and the way 'fixed' does not read it"]),
        ({"strategy": "parallel", "alpha": None}, ["strategy 'parallel' averages gradients at every step, where"]),
        ({"strategy": "post_local", "switch_step": 5}, ["at every step before its switch_step (5)"]),
        ({"lr": None, "warmup_steps": 0}, ["there is no lr block"]),
        ({"averaging": {"cuda_graph": True}}, ["averaging.cuda_graph is True", "addresses"]),
        ({"averaging": {"two_level": True}}, ["averaging.two_level is True"]),
        ({"averaging": {"wire_dtype": "bf16"}}, ["averaging.wire_dtype is 'bf16'"]),
        ({"averaging": {"overlap": "next_forward"}}, ["averaging.overlap is 'next_forward'"]),
        ({"averaging": {"fragments": 2}}, ["averaging.fragments is 2"]),
        ({"faults": {"on_signal": "cut_round"}}, ["faults.on_signal is 'cut_round'", "write 'save' or 'finish_round'"]),
        ({"averaging": {"mixing": 0.5}}, ["averaging.mixing is 0.5"]),
        ({"faults": {"outlier": {"z": 3, "then": "clip"}}}, ["faults.outlier is given", "how far each has moved"]),
    ],
)
def test_what_members_cannot_do_is_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**{"membership": "torchft", **changes})
    for word in words:
        assert word in str(caught.value)


def test_post_local_that_begins_with_local_steps_is_taken() -> None:
    assert made(membership="torchft", strategy="post_local", switch_step=0, alpha=None).membership.elastic
