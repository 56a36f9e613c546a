"""The slow, obvious version of everything that the package does fast. It is the oracle of the tests.

One process holds K models and K optimizers and does what the paper's Algorithm 1 says, a step at a time. Nothing here
imports qsr_engine: schedules and periods are written again, from the formulas, with decimal arithmetic.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def learning_rate(lr: dict[str, Any], step: int, total: int) -> float:
    """The formulas of the schedules, from a plain `lr` block."""
    low, peak, warmup = lr.get("min", 0.0), lr["peak"], lr.get("warmup_steps", 0)
    if step < warmup:
        return float(low + step * (peak - low) / warmup)
    done = (step - warmup) / (total - warmup) if total > warmup else 0.0
    cosine = low + (peak - low) * (1 + math.cos(math.pi * done)) / 2
    if lr["schedule"] == "cosine":
        return float(cosine)
    if lr["schedule"] == "linear":
        return float(low + (peak - low) * (1 - done))
    if lr["schedule"] == "constant":
        return float(peak)
    if lr["schedule"] == "cosine_step":
        base = lr.get("base", 2.0)
        return float(base ** round(math.log(cosine) / math.log(base))) if cosine > 0 else 0.0
    value = peak
    for decay in lr["decay_steps"]:
        if step >= decay:
            value = value * lr.get("factor", 0.1)
    return float(value)


def exact_learning_rate(lr: dict[str, Any], step: int, total: int) -> Decimal:
    """The same formulas in 60 digits, from the numbers as a person wrote them.

    The rule takes a floor, so a float that is one rounding off 1/3000 would give 2 where alpha / lr is 3.
    """
    with localcontext() as context:
        context.prec = 60
        low, peak = (Decimal(repr(float(lr.get(key, 0.0)))) for key in ("min", "peak"))
        warmup = int(lr.get("warmup_steps", 0))
        if step < warmup:
            return low + step * (peak - low) / warmup
        done = Decimal(step - warmup) / (total - warmup) if total > warmup else Decimal(0)
        cosine = low + (peak - low) * (1 + _cos_pi(done)) / 2
        if lr["schedule"] == "cosine":
            return cosine
        if lr["schedule"] == "linear":
            return low + (peak - low) * (1 - done)
        if lr["schedule"] == "constant":
            return peak
        if lr["schedule"] == "cosine_step":
            base = Decimal(repr(float(lr.get("base", 2.0))))
            return base ** round(cosine.ln() / base.ln()) if cosine > 0 else Decimal(0)
        decays = sum(1 for decay in lr["decay_steps"] if step >= decay)
        return peak * Decimal(repr(float(lr.get("factor", 0.1)))) ** decays


def _cos_pi(x: Decimal) -> Decimal:
    """cos(pi x) for x from 0 to 1, by its power series in the precision of the context."""
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
    term = total = Decimal(1)
    for n in range(1, 60):
        term *= -((pi * x) ** 2) / (2 * n * (2 * n - 1))
        total += term
    return total


def quadratic_period(qsr: dict[str, Any], step: int, lr: Decimal) -> int:
    """max(h_base, floor((alpha / lr)^power)), not yet cut to h_max and the end of the run; exact decimal arithmetic."""
    h_base, alpha = qsr.get("h_base", 1), qsr.get("alpha") or 0.0
    if step < qsr.get("lr", {}).get("warmup_steps", qsr.get("warmup_steps") or 0):
        return int(qsr.get("h_warmup") or h_base)
    if alpha == 0:
        return int(h_base)
    if lr < Decimal(10) ** -50:  # what 60 digits leave of 0
        return int(qsr["total_steps"])
    with localcontext() as context:
        context.prec = 60
        value = (Decimal(repr(alpha)) / lr) ** Decimal(repr(qsr.get("power", 2.0)))
        # 60 digits cannot hold 1/3 either: 0.001 / (1 / 3000) must count as 3.
        return max(int(h_base), int(value * (1 + Decimal(10) ** -40)))


def boundaries(qsr: dict[str, Any]) -> list[tuple[int, str]]:
    """(steps done, mode) at the end of every round, found by counting single steps as the authors' code does."""
    total, switch = qsr["total_steps"], qsr.get("switch_step") or 0
    found: list[tuple[int, str]] = []
    since = period = 0
    for step in range(total):
        parallel = qsr["strategy"] == "parallel" or (qsr["strategy"] == "post_local" and step < switch)
        if since == 0:
            period = 1 if parallel else qsr.get("h_base", 1)
            if qsr["strategy"] == "qsr":
                period = quadratic_period(qsr, step, exact_learning_rate(qsr["lr"], step, total))
            if qsr["strategy"] == "swap" and step >= switch:
                period = total
        since += 1
        swap_begins = qsr["strategy"] == "swap" and step + 1 == switch
        if since >= min(period, qsr.get("h_max") or total) or step + 1 == total or swap_begins:
            found.append((step + 1, "parallel" if parallel else "local"))
            since = 0
    return found


def simulate(
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    batches: Callable[[int, int], list[Batch]],
    qsr: dict[str, Any],
    workers: int,
    clip: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss,
    delay: int = 0,
    worker_size: int = 1,
    loss_scale: float = 1.0,
    reduce_dtype: torch.dtype | None = None,
    zero_step: bool = False,
    skipped: Callable[[int, int], bool] = lambda worker, step: False,
    state: tuple[str, ...] | dict[str, int] = (),
    average_buffers: bool = False,
    gradient_dtype: torch.dtype | None = None,
    outer: dict[str, Any] | None = None,
    outer_unit: int | None = None,
    fragment_of: Tensor | None = None,
    mixing: float = 0.0,
    outlier: dict[str, Any] | None = None,
    told: list[tuple[int, int]] | None = None,
    present: Callable[[int, int], bool] = lambda worker, round_start: True,
    joins_fresh: bool = False,
    late: Callable[[int, int], int] = lambda worker, round_start: 0,
) -> tuple[list[nn.Module], list[float]]:
    """Train K workers in one process.

    Args:
        make_model: gives the same initial parameters every time.
        make_optimizer: the local optimizer; its learning rate is set at every step.
        batches: batches(rank, step) are the micro-batches of one step of one rank; their gradients are averaged.
        clip: L2 norm to which each worker clips its gradient, 0 for none.
        compute_dtype: forward and backward use a copy of the parameters in this type, the optimizer the parameters
            themselves (the masters); gradients are accumulated and averaged in this type.
        loss: of outputs and targets, a mean over the micro-batch.
        worker_size: ranks of a worker; each has batches of its own, and their gradients are averaged.
        loss_scale: the loss is multiplied by it before the backward pass, and the gradient divided by it after.
        reduce_dtype: type in which gradients are averaged, in a worker and in parallel; without it, the compute type.
        zero_step: DeepSpeed makes the state of some optimizers by a step with a gradient of zero before the first one.
        skipped: whether a worker skips its update at a step, as after an overflow.
        state: names of the optimizer's state that is averaged with the parameters; with numbers, at the end of every
            so manieth round.
        average_buffers: floating-point buffers (batch-norm statistics), of which every rank has its own, are averaged
            over all ranks at a boundary of local steps; the models returned hold those of each worker's first rank.
        gradient_dtype: type to which a rank's gradient goes before it is averaged, and in which it stays.
        outer: arguments of torch.optim.SGD, which at each boundary of local steps takes (what the round began with -
            the average) for the gradient of what the round began with; one optimizer a fragment.
        outer_unit: steps at the peak learning rate for which outer's lr and momentum are meant. After a round in which
            the learning rates add up to p times as much they are 1 - (1 - lr)^p and momentum^p.
        delay: steps from a boundary until its average takes effect, as x += average - x at the boundary; at the latest
            at the next boundary, and at once at the last one.
        fragment_of: the fragment of every element, in the order of the parameters: a whole number from 0. Number p of P
            is averaged after floor((p + 1) H / P) steps of a round, but not before its first; all of them at the end.
        mixing: what a worker keeps of its own parameters at a boundary, but for the end: x = mixing x + (1 - mixing)
            average.
        outlier: z, then ("leave_out" or "clip") and after_averagings. A worker moves from what it held after its last
            averaging; of the norm over the lower median of all workers', mean and variance over the averagings so far
            (exponential ones once there are 50, each with a weight of 0.02) tell outliers, which these do not count.
            One that is left out gets the average of the others, and the mean of their optimizer states.
        told: (step, worker) of each outlier is added to it.
        present: whether a worker takes part in the round that begins after so many steps. One that is absent takes no
            step and adds nothing to the average; when it comes, it begins the round with the average of the round
            before, and the mean of the optimizer states that were in it, or none (joins_fresh).
        late: how many boundaries a worker misses with the round that begins after so many steps, from that round's own
            one on. Then it takes no step until the next one, where what its parameters have moved in that round counts
            as if it had moved from where the others began; it goes on with the average and its own optimizer state.
    Returns:
        The K models after the last boundary, and the relative distance of the workers just before each averaging.
    """
    total = qsr["total_steps"]
    models = [make_model() for _ in range(workers)]
    optimizers = [make_optimizer(_trained(model)) for model in models]
    if zero_step:
        for model, optimizer in zip(models, optimizers, strict=True):
            for parameter in _trained(model):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    buffers = [[b.clone() for b in models[0].buffers()] for _ in range(workers * worker_size)]  # of every rank
    ends = dict(boundaries(qsr))
    first_local = next((step for step, mode in ends.items() if mode == "local"), total + 1)
    distances = []
    if fragment_of is None:
        fragment_of = torch.zeros_like(_flat(models[0]), dtype=torch.int64)
    fragments = int(fragment_of.max()) + 1
    began = [_flat(models[0])[fragment_of == p] for p in range(fragments)]  # what each fragment's round began with
    outer_optimizers = [torch.optim.SGD([x], **outer) for x in began] if outer else []
    differences: list[Tensor] = []  # average - x at the boundary, of every worker, while they are delayed
    apply_at = round_start = 0
    held = [_flat(model) for model in models]  # of each worker, what each fragment held after its last averaging
    owed: dict[int, tuple[int, Tensor]] = {}  # of who is late: boundaries that it still misses, and its movement
    usual: list[float] = []  # mean, variance and number of averagings of what outliers are judged by
    for step in range(total):
        there = [worker for worker in range(workers) if present(worker, round_start) and worker not in owed]
        for worker in there:
            model, ranks = models[worker], range(worker * worker_size, (worker + 1) * worker_size)
            found = []
            for rank in ranks:
                _set_buffers(model, buffers[rank])
                own = _gradient(model, batches(rank, step), compute_dtype, loss, loss_scale)
                found.append([gradient.to(gradient_dtype or gradient.dtype) for gradient in own])
                buffers[rank] = [buffer.clone() for buffer in model.buffers()]
            _average(found, reduce_dtype or gradient_dtype or compute_dtype)
            for parameter, gradient in zip(_trained(model), found[0], strict=True):
                parameter.grad = gradient.to(parameter.dtype)
        parallel = ends.get(step + 1) == "parallel" and step + 1 < first_local
        if parallel:
            _average(
                [[p.grad for p in _trained(model)] for model in models],
                reduce_dtype or gradient_dtype or compute_dtype,
            )
        for worker in there:
            model, optimizer = models[worker], optimizers[worker]
            for parameter in _trained(model):
                assert parameter.grad is not None
                parameter.grad *= 1.0 / loss_scale
            if clip:
                nn.utils.clip_grad_norm_(_trained(model), clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(qsr["lr"], step, total)
            if not skipped(worker, step):
                optimizer.step()
        if parallel:
            for p, x in enumerate(began):
                x.copy_(_flat(models[0])[fragment_of == p])
        due = [] if parallel else _due(ends, round_start, step + 1, fragments)
        if differences and (step + 1 == apply_at or due):
            for model, difference in zip(models, differences, strict=True):
                _set_flat(model, _flat(model) + difference)
            differences = []
        if due:
            here = torch.isin(fragment_of, torch.tensor(due))
            own = [_flat(model) for model in models]
            owed |= {k: (n + 1, own[k] - held[k]) for k in there if (n := late(k, round_start))}
            owed = {worker: (misses - 1, moved_by) for worker, (misses, moved_by) in owed.items()}
            on_time = [worker for worker in there if worker not in owed]
            distances.append(relative_distance([own[worker][here] for worker in on_time]))
            far: dict[int, float] = {}
            if outlier:
                moved = [float((x - y)[here].double().norm()) for x, y in zip(own, held, strict=True)]
                far = _outliers(moved, outlier, usual)
            if told is not None:
                told += [(step + 1, worker) for worker in far]
            gone = far if outlier and outlier["then"] == "leave_out" else {}
            for worker in far.keys() - gone.keys():
                clipped = held[worker] + far[worker] * (own[worker] - held[worker])
                own[worker] = torch.where(here, clipped, own[worker])
            here = here | bool(gone)  # then all fragments are averaged
            due = list(range(fragments)) if gone else due
            others = [own[worker] for worker in on_time if worker not in gone]
            others += [held[on_time[0]] + moved_by for misses, moved_by in owed.values() if not misses]
            here_late = {worker for worker, (misses, _) in owed.items() if not misses}
            owed = {worker: debt for worker, debt in owed.items() if worker not in here_late}
            mean = sum(others[1:], start=others[0].clone()) / len(others)
            for worker in gone:
                own[worker] = mean.clone()
                _give_mean_of_states(models, optimizers, worker, gone)
            share = 0.0 if step + 1 == total else mixing
            if delay and step + 1 < total:
                apply_at = step + 1 + delay
                differences = [torch.where(here, (1 - share) * (mean - x), 0.0) for x in own]
            else:
                for p in due if outer else []:
                    if outer and outer_unit:
                        rates = [learning_rate(qsr["lr"], s, total) for s in range(round_start, step + 1)]
                        length = sum(rates) / (outer_unit * qsr["lr"]["peak"])
                        outer_optimizers[p].param_groups[0]["lr"] = 1 - (1 - outer["lr"]) ** length
                        outer_optimizers[p].param_groups[0]["momentum"] = outer.get("momentum", 0.0) ** length
                    began[p].grad = began[p] - mean[fragment_of == p]
                    outer_optimizers[p].step()
                    mean[fragment_of == p] = began[p]
                for worker, (model, x) in enumerate(zip(models, own, strict=True)):
                    kept = 0.0 if worker in gone else share
                    _set_flat(model, torch.where(here, kept * x + (1 - kept) * mean, x))
            held = [torch.where(here, _flat(model), y) for model, y in zip(models, held, strict=True)]
        if step + 1 in ends:
            round_start = step + 1
        if step + 1 in ends and not parallel:
            rounds = sum(1 for end in ends if end <= step + 1)
            for name in [n for n in state if rounds % (state[n] if isinstance(state, dict) else 1) == 0]:
                _average(
                    [
                        [optimizer.state[p][name] for p in _trained(model)]
                        for model, optimizer in zip(models, optimizers, strict=True)
                    ]
                )
            if average_buffers:
                _average([[b for b in own if b.is_floating_point()] for own in buffers])
            for worker in set(range(workers)) - set(there) - here_late - set(owed):
                if present(worker, round_start):
                    _join(worker, on_time, models, optimizers, make_optimizer, fresh=joins_fresh)
    for worker, model in enumerate(models):
        _set_buffers(model, buffers[worker * worker_size])
    return models, distances


def _join(
    worker: int,
    members: list[int],
    models: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    fresh: bool,
) -> None:
    """A worker whose model is the members' average gets an optimizer with the mean of their states, or without any."""
    optimizers[worker] = made = make_optimizer(_trained(models[worker]))
    theirs = [[optimizers[one].state[p] for p in _trained(models[one])] for one in members]
    for place, parameter in enumerate(_trained(models[worker])):
        states = [of_one[place] for of_one in theirs]
        for name in [] if fresh else states[0]:
            values = [state[name] for state in states]
            made.state[parameter][name] = sum(values[1:], start=values[0].clone()) / len(values)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _set_buffers(model: nn.Module, values: list[Tensor]) -> None:
    for buffer, value in zip(model.buffers(), values, strict=True):
        buffer.copy_(value)


def _gradient(
    model: nn.Module,
    micro_batches: list[Batch],
    compute_dtype: torch.dtype | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    loss_scale: float,
) -> list[Tensor]:
    """The gradient of a rank, in the type that it computes in, times loss_scale."""
    computing = copy.deepcopy(model).to(compute_dtype) if compute_dtype else model
    computing.zero_grad()
    for inputs, targets in micro_batches:
        part = loss(computing(inputs), targets) / len(micro_batches)
        if loss_scale != 1.0:
            part = part.float() * loss_scale
        part.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in computing.parameters()]
    return [gradient.clone() for gradient in gradients if gradient is not None]


@torch.no_grad()
def _average(tensors_of_workers: list[list[Any]], dtype: torch.dtype | None = None) -> None:
    for same in zip(*tensors_of_workers, strict=True):
        in_dtype = [tensor.to(dtype or tensor.dtype) for tensor in same]
        mean = sum(in_dtype[1:], start=in_dtype[0].clone()) / len(same)
        for tensor in same:
            tensor.copy_(mean)


@torch.no_grad()
def relative_distance(workers: list[Tensor]) -> float:
    """sqrt(mean over workers of |x_k - x|^2) / |x|, from the definition."""
    exact = [x.double() for x in workers]
    mean = torch.stack(exact).mean(0)
    spread = torch.stack([(x - mean).square().sum() for x in exact]).mean().sqrt()
    return float(spread / mean.norm())


def _outliers(moved: list[float], outlier: dict[str, Any], usual: list[float]) -> dict[int, float]:
    """The limit over how far it moved, for every worker that moved too far; `usual` learns from the others."""
    median = sorted(moved)[(len(moved) - 1) // 2]
    if median == 0:
        return {}
    ratios = [norm / median for norm in moved]
    limit = math.inf
    if usual and usual[2] >= outlier["after_averagings"] and usual[1] > 0:
        limit = max(1.0, usual[0] + outlier["z"] * math.sqrt(usual[1]))
    good = [ratio for ratio in ratios if ratio <= limit]
    mean, variance, count = usual or [0.0, 0.0, 0]
    weight = max(0.02, 1 / (count + 1))
    mean = (1 - weight) * mean + weight * sum(good) / len(good)
    variance = (1 - weight) * variance + weight * sum((ratio - mean) ** 2 for ratio in good) / len(good)
    usual[:] = [mean, variance, count + 1]
    return {worker: limit / ratio for worker, ratio in enumerate(ratios) if ratio > limit}


def _give_mean_of_states(models: list[Any], optimizers: list[Any], worker: int, gone: dict[int, float]) -> None:
    states = [
        [optimizer.state[p] for p in _trained(model)] for model, optimizer in zip(models, optimizers, strict=True)
    ]
    for parameter, mine in enumerate(states[worker]):
        for name in [name for name, value in mine.items() if isinstance(value, Tensor) and value.dim()]:
            others = [own[parameter][name] for k, own in enumerate(states) if k not in gone]
            mine[name].copy_(sum(others[1:], start=others[0].clone()) / len(others))


def _due(ends: dict[int, str], start: int, done: int, fragments: int) -> list[int]:
    """The fragments to average after so many steps of the run, in the round that began at `start`."""
    end = min(end for end in ends if end > start)
    if done == max(ends):
        return list(range(fragments))
    return [p for p in range(fragments) if start + max(1, math.floor((p + 1) * (end - start) / fragments)) == done]


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def _set_flat(model: nn.Module, values: Tensor) -> None:
    parts = torch.split(values, [parameter.numel() for parameter in model.parameters()])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.data.copy_(part.view(parameter.shape))
