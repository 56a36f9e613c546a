"""The real DeepSpeed engine gives what tests/support/reference.py gives, which simulates the workers in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.deepspeed_run import STRATEGIES, assert_all_equal, averaging, block, expected, train
from tests.support.pool import Processes


@pytest.mark.fast_cells(4, of=7)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_two_workers_equal_the_reference(processes: Processes, strategy: str, optimizer: str) -> None:
    """Bit for bit: with two summands and a division by two, the order of operations is the same.

    In fp64, but for `parallel`: DeepSpeed's own data parallel does not reduce fp64 gradients.
    """
    dtype = torch.float32 if strategy == "parallel" else torch.float64
    qsr = block(strategy, optimizer)
    results = processes.run(train, ranks=2, qsr=qsr, optimizer=optimizer, dtype=dtype)
    oracle = expected(qsr, optimizer, workers=2, dtype=dtype)
    assert_all_equal(results)
    assert results[0]["ends"] == oracle["ends"]
    assert torch.equal(results[0]["parameters"], oracle["parameters"])
    if strategy not in ("parallel", "post_local"):
        lengths = torch.tensor([0, *oracle["ends"]]).diff()
        assert len(set(lengths.tolist())) > 1, "the rounds were meant to be of unequal length"
        # Sums of squares cancel (see Averager.relative_distance), so half of fp64's digits remain.
        assert results[0]["distances"] == pytest.approx(oracle["distances"], rel=1e-6)


def test_three_workers_equal_the_reference(processes: Processes) -> None:
    """With three summands the all-reduce may add in another order; fp64 rounds 22 steps to within 1e-12."""
    qsr = block("qsr", "adamw")
    results = processes.run(train, ranks=3, qsr=qsr, optimizer="adamw")
    assert_all_equal(results)
    oracle = expected(qsr, "adamw", workers=3)
    assert results[0]["ends"] == oracle["ends"]
    torch.testing.assert_close(results[0]["parameters"], oracle["parameters"], rtol=1e-12, atol=1e-12)


def test_gradient_accumulation_counts_as_one_step(processes: Processes) -> None:
    """DeepSpeed divides the loss by the number of micro-batches, as the reference does, so the bits are the same."""
    qsr = block("qsr", "sgd")
    results = processes.run(train, ranks=2, qsr=qsr, optimizer="sgd", accumulation=2)
    oracle = expected(qsr, "sgd", workers=2, accumulation=2)
    assert_all_equal(results)
    assert results[0]["ends"] == oracle["ends"]
    assert torch.equal(results[0]["parameters"], oracle["parameters"])


@pytest.mark.fast_cells(2, of=3)
@pytest.mark.parametrize("strategy", ["qsr", "post_local"])
@pytest.mark.parametrize("stage", [0, 1])
def test_workers_of_two_ranks_equal_the_reference(processes: Processes, stage: int, strategy: str) -> None:
    """Two workers of two ranks in fp32, bit for bit: two gradients are added in a worker, and two masters across."""
    qsr = block(strategy, "sgd", worker_size=2)
    zero: dict[str, Any] = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    results = processes.run(train, ranks=4, qsr=qsr, optimizer="sgd", dtype=torch.float32, ds_config=zero)
    assert_all_equal(results)
    oracle = expected(qsr, "sgd", workers=2, worker_size=2, dtype=torch.float32)
    assert results[0]["ends"] == oracle["ends"]
    assert torch.equal(results[0]["parameters"], oracle["parameters"])
    if strategy == "qsr":  # in fp32, sums of squares resolve a distance of 1e-2 to about 1e-3 of it
        assert results[0]["distances"] == pytest.approx(oracle["distances"], rel=1e-2)


def test_clipping_is_per_worker(processes: Processes) -> None:
    """As in the authors' code: every worker clips its own gradient. torch's clip adds 1e-6 to the norm and DeepSpeed's
    does not divide exactly alike, which is 1e-6 relative of a step of at most 0.05: 1e-5 over the run."""
    qsr = block("constant", "sgd")
    results = processes.run(
        train, ranks=2, qsr=qsr, optimizer="sgd", dtype=torch.float32, ds_config={"gradient_clipping": 0.1}
    )
    assert_all_equal(results)
    oracle = expected(qsr, "sgd", workers=2, clip=0.1, dtype=torch.float32)
    unclipped = expected(qsr, "sgd", workers=2, dtype=torch.float32)
    torch.testing.assert_close(results[0]["parameters"], oracle["parameters"], rtol=0, atol=1e-5)
    assert (oracle["parameters"] - unclipped["parameters"]).abs().max() > 1e-3, "the clipping was meant to matter"


BF16: dict[str, Any] = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}


@pytest.mark.fast_cells(3)
@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_bf16_under_zero_1_equals_the_reference(processes: Processes, strategy: str) -> None:
    """Bit for bit, the fp32 masters and the bf16 copies that the next forward reads."""
    optimizer = "adamw"
    qsr = block(strategy, optimizer)
    dtypes: dict[str, Any] = {"dtype": torch.float32, "compute_dtype": torch.bfloat16}
    results = processes.run(train, ranks=2, qsr=qsr, optimizer=optimizer, ds_config=BF16, **dtypes)
    oracle = expected(qsr, optimizer, workers=2, **dtypes)
    assert_all_equal(results)
    assert results[0]["ends"] == oracle["ends"]
    assert results[0]["parameters"].dtype == torch.bfloat16
    assert torch.equal(results[0]["parameters"], oracle["parameters"].bfloat16())
    if strategy != "parallel":
        assert torch.equal(results[0]["masters"], oracle["parameters"])


def test_bf16_with_fp32_gradient_accumulation(processes: Processes) -> None:
    """DeepSpeed takes another optimizer class for it, with masters of another name."""
    qsr = block("qsr", "adamw")
    dtypes: dict[str, Any] = {"dtype": torch.float32, "compute_dtype": torch.bfloat16}
    config = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    results = processes.run(train, ranks=2, qsr=qsr, optimizer="adamw", ds_config=config, **dtypes)
    oracle = expected(qsr, "adamw", workers=2, **dtypes)
    assert_all_equal(results)
    assert torch.equal(results[0]["masters"], oracle["parameters"])
    assert torch.equal(results[0]["parameters"], oracle["parameters"].bfloat16())


# ------------------------------------------------------------------------------------------------- overlap

SETTINGS: dict[str, dict[str, Any]] = {
    "stage0-fp64": {},
    "stage1-bf16": {"ds_config": BF16, "dtype": torch.float32, "compute_dtype": torch.bfloat16},
}
TINY = 0.0003  # MB: a bucket of 300 bytes, so that the small model is in many pieces


@pytest.mark.fast_cells(4)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shared", [False, True], ids=["gloo", "shared_memory"])
def test_overlapped_with_the_next_forward_the_numbers_are_the_same(
    processes: Processes, setting: str, shared: bool
) -> None:
    """Bit for bit, from many small buckets, by both ways of averaging."""
    qsr, accumulation = block("qsr", "adamw"), 2
    overlapped = averaging(qsr, overlap="next_forward", bucket_mb=TINY, shared_memory=shared)
    options = SETTINGS[setting]
    results = processes.run(train, ranks=2, qsr=overlapped, optimizer="adamw", accumulation=accumulation, **options)
    types = {key: value for key, value in options.items() if key != "ds_config"}
    oracle = expected(qsr, "adamw", workers=2, accumulation=accumulation, **types)
    assert_all_equal(results)
    assert results[0]["ends"] == oracle["ends"]
    assert torch.equal(results[0]["parameters"], oracle["parameters"].to(results[0]["parameters"].dtype))
    if "compute_dtype" not in options:  # a distance is known when the averaging has ended, a boundary later
        assert results[0]["distances"][1:-1] == pytest.approx(oracle["distances"][:-2], rel=1e-6)
        assert results[0]["distances"][-1] == pytest.approx(oracle["distances"][-1], rel=1e-6)


@pytest.mark.fast_cells(3)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("strategy", ["qsr", "constant"])
@pytest.mark.parametrize("delay", [1, 100])
def test_a_delayed_average_equals_the_reference(processes: Processes, setting: str, strategy: str, delay: int) -> None:
    """Bit for bit: also where the delay is as long as a round, or longer than any."""
    qsr = block(strategy, "sgd")
    delayed = averaging(qsr, overlap="delayed", delay_steps=delay)
    options = SETTINGS[setting]
    results = processes.run(train, ranks=2, qsr=delayed, optimizer="sgd", **options)
    types = {key: value for key, value in options.items() if key != "ds_config"}
    oracle = expected(qsr, "sgd", workers=2, delay=delay, **types)
    assert_all_equal(results)
    assert results[0]["ends"] == oracle["ends"]
    assert torch.equal(results[0]["parameters"], oracle["parameters"].to(results[0]["parameters"].dtype))
    plain = expected(qsr, "sgd", workers=2, **types)
    assert not torch.equal(plain["parameters"], oracle["parameters"]), "the delay was meant to matter"


def test_a_delayed_average_in_workers_of_two_ranks(processes: Processes) -> None:
    """Under ZeRO a rank delays the average of its part."""
    qsr = block("qsr", "sgd", worker_size=2)
    zero: dict[str, Any] = {"zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    results = processes.run(
        train,
        ranks=4,
        qsr=averaging(qsr, overlap="delayed", delay_steps=2),
        optimizer="sgd",
        dtype=torch.float32,
        ds_config=zero,
    )
    assert_all_equal(results)
    oracle = expected(qsr, "sgd", workers=2, worker_size=2, dtype=torch.float32, delay=2)
    assert torch.equal(results[0]["parameters"], oracle["parameters"])


# ------------------------------------------------------------------------------------------------- wire types


@pytest.mark.fast_cells(3)
@pytest.mark.parametrize("overlap", ["none", "next_forward"])
@pytest.mark.parametrize(("wire", "bits"), [("bf16", 8), ("fp16", 11), ("int8", 7)])
def test_fewer_bits_on_the_wire_stay_near_the_reference(
    processes: Processes, wire: str, bits: int, overlap: str
) -> None:
    """Each of the 9 averagings rounds the differences of a round twice, to 2^-bits relative of the largest. The
    differences are at most a few steps of 0.05; in sum the run ends within 9 x 2 x 2^-bits x 0.1 of the reference, the
    feedback of such errors through the later gradients left aside (a factor of 2 allows for it)."""
    qsr = block("qsr", "sgd")
    results = processes.run(
        train, ranks=2, qsr=averaging(qsr, wire_dtype=wire, overlap=overlap), optimizer="sgd", dtype=torch.float32
    )
    assert_all_equal(results)
    oracle = expected(qsr, "sgd", workers=2, dtype=torch.float32)
    error = (results[0]["parameters"] - oracle["parameters"]).abs().max()
    assert 0 < error < 9 * 2 * 2.0**-bits * 0.1 * 2
