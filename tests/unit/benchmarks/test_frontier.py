"""The frontier's workers, batched in one process, are the reference's; and what it says of them follows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.frontier import cases, study
from benchmarks.frontier.muon import BatchedMuon
from benchmarks.frontier.predictions import PREDICTED
from benchmarks.frontier.problems import CLASSES, Batches, Network, Pictures, Problem
from benchmarks.frontier.rules import RULES, block, period_for
from benchmarks.frontier.sensing import SIZE, sensing_batches
from benchmarks.frontier.sparse import sparse_batches
from benchmarks.frontier.statements import difference, foretold, verdict
from benchmarks.frontier.workers import Outcome, end_of
from qsr_engine.engines.muon import MuonWithAdamW
from qsr_engine.schedule import rounds
from tests.support import reference

INPUTS = 6
TINY = Problem("tiny", steps=24, samples=20, hidden=(7, 5), workers=3, rate=0.2)


def pictures() -> Pictures:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % CLASSES
    return Pictures(torch.randn(60, INPUTS, generator=generator) + labels[:, None] / 5, labels)


def as_module(row: Tensor, problem: Problem) -> nn.Sequential:
    """torch's own layers with the parameters of one copy."""
    parts: list[nn.Module] = []
    for weights, biases in Network(INPUTS, problem).layers(row[None]):
        linear = nn.Linear(*weights.shape[1:])
        linear.weight.data, linear.bias.data = weights[0].T.clone(), biases[0, 0].clone()
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1).mean() / 2


def with_muon(parameters: list[nn.Parameter]) -> MuonWithAdamW:
    """The last layer is AdamW's, as MuonWithAdamW's docstring asks for."""
    return MuonWithAdamW([{"params": parameters[:-2]}, {"params": parameters[-2:], "muon": False}])


def end_of_reference(problem: Problem, rule: str, trial: int, **told: Any) -> Tensor:
    drawn = Batches(problem, pictures(), 2, block=5)
    seen = [drawn.next() for _ in range(problem.steps)]
    qsr = block(rule, 2, 0.5, problem, problem.rate)
    kinds: dict[str, Any] = {
        "sgd": lambda parameters: torch.optim.SGD(parameters),
        "momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
        "adamw": lambda parameters: torch.optim.AdamW(parameters),
        "muon": with_muon,
    }
    models, _ = reference.simulate(
        lambda: as_module(drawn.start[trial], problem),
        kinds[problem.optimizer],
        lambda rank, step: [(seen[step][0][rank, trial], seen[step][1][rank, trial])],
        qsr.model_dump(exclude_none=True),
        workers=problem.workers,
        loss=half_squared_error if problem.loss == "squared" else nn.functional.cross_entropy,
        **told,
    )
    layers = [layer for layer in models[0].modules() if isinstance(layer, nn.Linear)]
    return torch.cat([values.detach().flatten() for one in layers for values in (one.weight.T, one.bias)])


DILOCO = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
MUON = {"optimizer": "muon", "rate": 0.02, "steps": 6}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # rule, changes of the problem, told to the reference
    "QSR": ("QSR", {}, {}),
    "parallel": ("parallel", {"optimizer": "momentum", "rate": 0.05}, {}),
    "post_local": ("post_local", {"optimizer": "momentum", "rate": 0.05}, {}),
    "swap, entropy": ("swap", {"loss": "cross_entropy"}, {}),
    "outer": ("QSR, outer in units", {"rate": 0.05}, {"outer": DILOCO, "outer_unit": 2}),
    "moments": (
        "constant",
        {"optimizer": "adamw", "rate": 0.02, "state": (("exp_avg", 2), ("exp_avg_sq", 3))},
        {"state": {"exp_avg": 2, "exp_avg_sq": 3}},
    ),
    "Muon": ("constant", MUON, {}),
    "Muon, post_local": ("post_local", MUON, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_batched_workers_end_where_the_reference_ends(name: str) -> None:
    """In fp32, with sums in another order; Muon's directions are in bf16, whose rounding is 0.4 % of each entry."""
    rule, changes, told = CASES[name]
    problem = dataclasses.replace(TINY, **changes)
    batches = Batches(problem, pictures(), 2, block=5)
    found, _, _ = end_of(batches, block(rule, 2, 0.5, problem, problem.rate))
    wanted = torch.stack([end_of_reference(problem, rule, trial, **told) for trial in range(2)])
    rtol, atol = (1e-2, 1e-3) if problem.optimizer == "muon" else (1e-4, 1e-5)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
    assert (found - batches.start).abs().max() > 0.05
    errors = batches.errors(found)
    with torch.no_grad():
        held, labels = batches.held_out[1], pictures().labels
        out = as_module(found[1], problem)(pictures().pixels[held])
    assert errors[1] == pytest.approx(100 * float((out.argmax(1) != labels[held]).float().mean()), abs=1e-3)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_gradients_by_hand_are_autograds(loss: str) -> None:
    problem = dataclasses.replace(TINY, loss=loss)
    network, drawn = Network(INPUTS, problem), Batches(problem, pictures(), 3, block=5)
    inputs, targets = (values[0] for values in drawn.next())
    into = torch.zeros_like(drawn.start)
    network.gradient(network.layers(drawn.start), network.layers(into), inputs, targets)
    rows = drawn.start.clone().requires_grad_()
    out = network.outputs(network.layers(rows), inputs)[-1]
    each = half_squared_error if loss == "squared" else nn.functional.cross_entropy
    total = sum(each(out[copy], targets[copy]) for copy in range(3))
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(into, rows.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_keeps_its_budget_with_the_smallest_period(rule: str) -> None:
    problem = dataclasses.replace(TINY, steps=2_000)
    period = period_for(rule, 0.05, problem)
    counts = [sum(1 for _ in rounds(block(rule, h, 0.05, problem, 1.0))) for h in (period, period - 1)]
    assert counts[0] <= 100 < counts[1]
    assert counts[0] > 60, "near its budget"


def test_batches_do_not_depend_on_the_rule_and_differ_between_blocks() -> None:
    one, other, third = (Batches(TINY, pictures(), 2, block) for block in (1, 1, 2))
    assert torch.equal(one.start, other.start)
    assert not torch.equal(one.start, third.start)
    seen = one.next()
    assert all(torch.equal(a, b) for a, b in zip(seen, other.next(), strict=True))
    assert seen[0].shape == (TINY.workers, 2, TINY.batch, INPUTS)


def test_tuning_goes_on_until_the_best_rate_lies_between_two_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def trained(batches: Any, qsr: Any) -> Outcome:
        asked.append(qsr.lr.peak)
        return Outcome([abs(qsr.lr.peak - 0.8)] * batches.trials, 24, 1, 0.0)

    monkeypatch.setattr(study, "train", trained)
    monkeypatch.setattr(study, "load", lambda problem, folder: pictures())
    case = cases.Case(TINY, "parallel", 1.0)
    row = study.Runs(tmp_path / "raw", None).result(case)
    assert row["rate"] == 0.8
    assert not row["edge"]
    assert asked == [0.1, 0.2, 0.4, 0.8, 1.6, 0.8], "the last one counts"
    again = study.Runs(tmp_path / "raw", None).result(case)
    assert len(asked) == 6, "what has run is kept"
    assert json.dumps(again) == json.dumps(row)


def test_a_verdict_says_no_more_than_the_interval() -> None:
    base = [10.0 + trial % 5 for trial in range(30)]
    one = {"rule": "QSR", "errors": [value - 1 + 0.1 * (trial % 3) for trial, value in enumerate(base)]}
    same = {"rule": "power 3", "errors": [value + (-1) ** trial for trial, value in enumerate(base)]}
    other = {"rule": "constant", "errors": base}
    assert verdict(other, one).startswith("QSR errs less than constant by 0.90 ± 0.03")
    assert verdict(same, other) == "power 3 and constant cannot be told apart (+0.00 ± 0.38)"
    assert difference(one, other)[0] == pytest.approx(-0.9)
    assert verdict(one, other, among=1000).endswith("0.03 points, all pairs considered")
    little = {"rule": "SWAP", "errors": [value - 0.41 + (-1) ** trial for trial, value in enumerate(base)]}
    assert verdict(little, other, among=2).endswith("by 0.41 ± 0.38 points"), "not with two pairs: ± 0.44"


def by_autograd(name: str, rows: Tensor, inputs: Tensor) -> Tensor:
    """The outputs [copies, batch] from the formula."""
    if name == "sparse":
        u, v = rows.chunk(2, 1)
        return torch.einsum("cbi,ci->cb", inputs, u * u - v * v)
    u = rows.view(-1, SIZE, SIZE)
    return torch.einsum("cbij,cik,cjk->cb", inputs.view(*inputs.shape[:2], SIZE, SIZE), u, u)


@pytest.mark.parametrize("name", ["sparse", "sensing"])
def test_gradients_of_regressions_are_autograds(name: str) -> None:
    problem = dataclasses.replace({"sparse": cases.SPARSE, "sensing": cases.SENSING}[name], workers=2, batch=3)
    drawn = study.REGRESSIONS[name](problem, 4, 1)
    inputs, labels = (values[1] for values in drawn.next())
    rows = drawn.start + torch.randn(drawn.start.shape, generator=torch.Generator().manual_seed(2))
    into = torch.zeros_like(rows)
    drawn.network.gradient(drawn.network.layers(rows), drawn.network.layers(into), inputs, labels)
    rows.requires_grad_()
    errors = by_autograd(name, rows, inputs) - labels
    (errors.square().mean(1) / 2).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(into, rows.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sparse", "sensing"])
def test_the_error_of_a_regression_is_that_on_new_inputs(name: str) -> None:
    """In the mean over 20,000 of its inputs, whose deviation is 1 % of it: so within 4 % of that."""
    problem = {"sparse": cases.SPARSE, "sensing": cases.SENSING}[name]
    many = dataclasses.replace(problem, samples=20_000, batch=20_000, workers=1, noise=0.0)
    drawn = study.REGRESSIONS[name](many, 2, 1)
    inputs, labels = (values[0] for values in drawn.next())
    missed = (by_autograd(name, drawn.start, inputs) - labels).square().mean(1)
    assert drawn.errors(drawn.start) == pytest.approx(missed.tolist(), rel=0.04)
    nothing = {"sparse": 3, "sensing": 9}[name]
    assert drawn.coefficients.square().sum(1).tolist() == pytest.approx([nothing] * 2, rel=1e-5)


def test_the_error_of_a_regression_is_none_at_the_true_coefficients() -> None:
    sensing = sensing_batches(cases.SENSING, 2, 1)
    values, vectors = torch.linalg.eigh(sensing.coefficients.view(-1, SIZE, SIZE))
    root = (vectors * values.clamp(min=0).sqrt()[:, None]).flatten(1)
    assert max(sensing.errors(root)) < 1e-4, "squares of fp32's rounding"
    sparse = sparse_batches(cases.SPARSE, 4, 1)
    found = torch.cat([sparse.coefficients.clamp(min=0), (-sparse.coefficients).clamp(min=0)], 1)
    assert sparse.errors(found) == [0] * 4


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_batched_muon_is_torchs_muon_on_every_matrix(shape: tuple[int, int]) -> None:
    """Both round to bf16 at the same places; a batch of products may sum in another order, so to bf16's 0.4 %."""
    copies, generator = 3, torch.Generator().manual_seed(4)
    gradients = torch.randn(5, copies, *shape, generator=generator)
    rows = nn.Parameter(torch.randn(copies, shape[0] * shape[1] + 2, generator=generator))
    start = rows.detach().clone()
    single = [nn.Parameter(row[:-2].view(shape).clone()) for row in start]
    theirs = torch.optim.Muon(single, lr=0.03, adjust_lr_fn="match_rms_adamw")
    ours = BatchedMuon(rows, lambda values: [values[:, :-2].view(-1, *shape)])
    for gradient in gradients:
        rows.grad = torch.cat([gradient.flatten(1), torch.ones(copies, 2)], 1)
        for parameter, own in zip(single, gradient, strict=True):
            parameter.grad = own.clone()
        ours.param_groups[0]["lr"] = 0.03
        ours.step()
        theirs.step()  # type: ignore[no-untyped-call]
    moved = rows.detach()[:, :-2].view(-1, *shape) - start[:, :-2].view(-1, *shape)
    wanted = torch.stack([one.detach() for one in single]) - start[:, :-2].view(-1, *shape)
    torch.testing.assert_close(moved, wanted, rtol=1e-2, atol=1e-3)
    assert wanted.abs().mean() > 0.015, "15 times the tolerance"


REPORT = Path(__file__).parents[3] / "benchmarks" / "results" / "frontier-2026-11-29-2.json"


def test_the_committed_rows_follow_from_the_committed_outcomes_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a new key of the configuration changed what all outcomes are kept under, and everything ran again."""
    monkeypatch.setattr(study, "train", None)
    kept = json.loads(REPORT.read_text())["rows"]
    (tmp_path / "raw").write_text(REPORT.with_suffix(".jsonl").read_text())
    runs = study.Runs(tmp_path / "raw", None, trains=False)
    for part, rows in kept.items():
        found = [runs.result(case) for case in cases.PARTS[part]() if runs.has(case)]
        assert json.loads(json.dumps(found)) == rows, part
    assert len(kept["main"]) == 24, "all but what outer and SWAP need at 0.25 %"
    unknown = cases.Case(TINY, "constant", 0.5)
    assert not runs.has(unknown)
    with pytest.raises(study.NotRunError, match=r"tiny, constant, 0\.5, 0\.1"):
        runs.result(unknown)


def test_a_prediction_stands_beside_what_was_found() -> None:
    """Of the differences that it names."""

    def row(rule: str, budget: float, less: float, problem: str = "K = 2") -> dict[str, Any]:
        return {"problem": problem, "rule": rule, "budget": budget, "errors": [9 - less + trial for trial in range(30)]}

    rows = [row("parallel", 1.0, 0), row("constant", 0.01, 0.5), row("QSR", 0.01, 0.75), row("power 3", 0.01, 3)]
    lines = foretold(rows).splitlines()
    assert lines[2] == f"| K = 2 | 1 | {PREDICTED['K = 2']} | -0.50 ± 0.00 | -0.75 ± 0.00 | -0.25 ± 0.00 |"
    fixed = [row(one["rule"], one["budget"], 0, "tiny, 4 times the rate") for one in rows]
    assert PREDICTED["fixed rate"] in foretold(fixed)
    every = [*(of.name for of in (cases.SPARSE, cases.SENSING, cases.PICTURES)), *cases.VARIED]
    assert set(every) | {"fixed rate"} == set(PREDICTED)


def test_a_fixed_rate_is_a_multiple_of_parallels_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []

    def trained(batches: Any, qsr: Any) -> Outcome:
        best = 0.1 if qsr.strategy == "parallel" else 0.4
        counted.append((qsr.strategy, qsr.lr.peak, batches.trials))
        return Outcome([abs(qsr.lr.peak - best)] * batches.trials, 24, 1, 0.0)

    monkeypatch.setattr(study, "train", trained)
    monkeypatch.setattr(study, "load", lambda problem, folder: pictures())
    runs = study.Runs(tmp_path / "raw", None)
    row = runs.result(cases.Case(TINY, "constant", 0.5, times=8.0))
    assert row["rate"] == pytest.approx(0.8)
    assert (row["edge"], row["tuning"]) == (False, {})
    assert row["problem"] == "tiny, 8 times the rate"
    assert counted[-1] == ("constant", pytest.approx(0.8), 30)
    assert {name for name, _, _ in counted[:-1]} == {"parallel"}
