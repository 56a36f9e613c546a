"""A model that waits for each parameter when it reads it, without a process group: the waits are noted."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsr_engine.averaging.background import THREAD, Background
from qsr_engine.averaging.gate import Gate

CPU = torch.device("cpu")


class Net(nn.Module):
    """Registered in another order than used; one layer is never called, and the weight of one is read from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.read_from_outside = nn.Linear(4, 4, bias=False)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.first(x), self.read_from_outside.weight)
        out: Tensor = self.last(self.first(x))  # called twice
        return out


def gate_of(module: nn.Module) -> tuple[Gate, dict[str, int]]:
    """A gate with one piece for each parameter, and the piece of each parameter's name."""
    names = {name: index for index, (name, _) in enumerate(module.named_parameters())}
    return Gate(module, {p: (names[name],) for name, p in module.named_parameters()}), names


def test_the_order_of_reading_is_recorded() -> None:
    net = Net()
    gate, names = gate_of(net)
    gate.record()
    net(torch.randn(2, 4))
    list(net.parameters())  # after the forward, an optimizer may read them all
    assert gate.recorded
    order, unseen = gate.order(len(names)), gate.unseen()
    by_number = list(names)
    assert [by_number[index] for index in order] == [
        "never.weight",
        "never.bias",
        "first.weight",
        "first.bias",
        "read_from_outside.weight",
        "last.weight",
        "last.bias",
    ]
    assert [p is q for p, q in zip(unseen, net.never.parameters(), strict=True)] == [True, True]


def test_each_read_waits_for_its_own_pieces_only() -> None:
    net = Net()
    gate, names = gate_of(net)
    waited: list[int] = []
    gate.guard(waited.append)
    net.first(torch.randn(2, 4))
    assert set(waited) == {names["first.weight"], names["first.bias"]}
    waited.clear()
    assert net.read_from_outside.weight is not None
    assert waited == [names["read_from_outside.weight"]]


@pytest.mark.parametrize(
    "read",
    [
        lambda net: net.state_dict(),
        lambda net: list(net.parameters()),
        lambda net: dict(net.named_parameters()),
        lambda net: copy.deepcopy(net),
        lambda net: [(dict(layer._parameters), {**layer._parameters}) for layer in net],
        lambda net: net.double(),
        lambda net: torch.func.functional_call(net, {}, torch.randn(2, 4)),
        lambda net: checkpoint(net, torch.randn(2, 4), use_reentrant=False),
    ],
    ids=["state_dict", "parameters", "named_parameters", "deepcopy", "dict", "to", "functional_call", "checkpoint"],
)
def test_every_way_to_read_a_parameter_waits(read: object) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    gate, names = gate_of(net)
    gate.record()
    net(torch.randn(2, 4))
    waited: set[int] = set()
    gate.guard(waited.add)
    read(net)  # type: ignore[operator]
    assert waited == set(names.values())


@pytest.mark.parametrize("kind", ["lstm", "attention"])
def test_layers_that_hold_their_parameters_otherwise(kind: str) -> None:
    """A recurrent layer reads a list of its own, and attention the weight of a child that it never calls."""
    layer: nn.Module = nn.LSTM(4, 4) if kind == "lstm" else nn.MultiheadAttention(4, 2)
    gate, names = gate_of(layer)
    x = torch.randn(3, 2, 4)
    gate.record()
    layer(x) if kind == "lstm" else layer(x, x, x)
    assert gate.unseen() == []
    waited: set[int] = set()
    gate.guard(waited.add)
    layer(x) if kind == "lstm" else layer(x, x, x)
    assert waited == set(names.values())


def test_a_forward_waits_at_once_for_what_nobody_saw_being_read() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)
            self.weights = [self.layer.weight]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weights[0]

    net = Hidden()
    gate, _ = gate_of(net)
    gate.record()
    list(net.parameters())  # before the forward, an optimizer may be made
    net(torch.randn(2, 4))
    waited: list[int] = []
    gate.guard(waited.append)
    net(torch.randn(2, 4))
    assert waited == [0]


def test_what_is_used_before_it_is_read_is_waited_for_at_once() -> None:
    """A list gives the weight to a penalty, and only then the layer reads it."""

    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))
            self.weights = list(self.layers[1].parameters())

        def forward(self, x: Tensor) -> Tensor:
            penalty = sum(weight.square().sum() for weight in self.weights)
            for layer in self.layers:
                x = layer(x)
            return x + penalty

    net = Penalty()
    gate, names = gate_of(net)
    gate.record()
    net(torch.randn(2, 4))
    assert [id(parameter) for parameter in gate.unseen()] == [id(net.weights[0])]
    waited: list[int] = []
    gate.guard(waited.append)
    net(torch.randn(2, 4))
    assert waited[0] == names["layers.1.weight"]


def test_a_copy_of_the_model_leaves_the_gate_alone() -> None:
    """A copy has the hooks of the original, such as an average of the weights that is evaluated at a boundary."""
    net = Net()
    gate, _ = gate_of(net)
    gate.record()
    early = copy.deepcopy(net)
    early(torch.randn(2, 4))
    assert not gate.recorded
    net(torch.randn(2, 4))
    waited: list[int] = []
    gate.guard(waited.append)
    late = copy.deepcopy(net)
    waited.clear()
    for twin in (early, late):
        twin(torch.randn(2, 4))
        assert waited == []
    assert net.first.weight is not None
    assert waited, "the model itself is still guarded"


def test_shared_weights_wait_in_each_place() -> None:
    encoder, decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    decoder.weight = encoder.weight
    gate = Gate(nn.ModuleList([encoder, decoder]), {encoder.weight: (0, 1)})
    waited: list[int] = []
    gate.guard(waited.append)
    decoder(torch.randn(2, 4))
    assert set(waited) == {0, 1}


def test_afterwards_the_model_is_as_it_was() -> None:
    net = Net()
    before = [
        (module._parameters, type(module._parameters), len(module._forward_pre_hooks)) for module in net.modules()
    ]
    gate, _ = gate_of(net)
    for begin in (gate.record, lambda: gate.guard(lambda index: None)):
        begin()
        net.first.weight = nn.Parameter(torch.ones(4, 4))  # a replacement made meanwhile stays
        gate.remove()
        gate.remove()
        after = [(m._parameters, type(m._parameters), len(m._forward_pre_hooks)) for m in net.modules()]
        assert [a[0] is b[0] for a, b in zip(after, before, strict=True)] == [True] * len(before)
        assert [a[1:] for a in after] == [b[1:] for b in before]
        assert bool((net.first.weight == 1).all())
    assert type(copy.deepcopy(net).first._parameters) is type(net.first._parameters)


@pytest.mark.parametrize("way", ["inside", "in_place", "function"])
def test_what_compiled_code_reads_is_waited_for_beforehand(way: str) -> None:
    """Compiled code reads parameters without asking the module."""
    net = Net()
    forward = net.forward
    if way == "inside":
        net.first = torch.compile(net.first, backend="eager")  # type: ignore[assignment]
    elif way == "in_place":
        net.first.compile(backend="eager")
    else:
        forward = torch.compile(net, backend="eager")
        forward(torch.randn(2, 4))  # compiled before anybody looks
    gate, _ = gate_of(net)
    gate.record()
    forward(torch.randn(2, 4))
    unseen = gate.unseen()
    compiled = list(net.parameters()) if way == "function" else list(net.first.parameters())
    assert {id(p) for p in compiled} <= {id(p) for p in unseen}


def slow(log: list[int], fail_at: int | None = None) -> Iterator[int]:
    for index in range(4):
        time.sleep(0.05)
        if index == fail_at:
            raise ValueError("the third piece")
        log.append(index)
        yield index


def test_the_background_gives_each_piece_when_it_is_there() -> None:
    log: list[int] = []
    background = Background(CPU)
    background.begin(slow(log), range(4))
    assert log == []
    background.wait(1)
    assert log[:2] == [0, 1]
    assert len(log) < 4, "it waited for the pieces up to 1 only"
    background.finish()
    assert log == [0, 1, 2, 3]
    background.close()


def test_what_fails_in_the_background_is_raised_where_somebody_waits() -> None:
    background = Background(CPU)
    background.begin(slow([], fail_at=2), range(4))
    with pytest.raises(ValueError, match="the third piece"):
        background.wait(3)
    for wait in (background.wait_for_all, background.finish):
        with pytest.raises(ValueError, match="the third piece"):
            wait()
    background.finish()
    background.begin(iter([0]), [0])
    background.finish()  # the next one knows nothing of it
    background.close()


def test_all_averagings_have_one_thread_that_ends_with_the_background() -> None:
    """There was a new one for each averaging."""

    def run(found: list[int | None]) -> Iterator[int]:
        yield 0
        time.sleep(0.02)  # it ends after its last piece
        found.append(threading.get_ident())

    before, found = set(threading.enumerate()), list[int | None]()
    background, idle = Background(CPU), Background(CPU)
    for number in range(3):
        background.begin(run(found), [0])
        background.finish()
        assert len(found) == number + 1, "finish() waits for the end"
    mine = [thread for thread in threading.enumerate() if thread not in before]
    assert [thread.ident for thread in mine] == found[:1]
    assert len(set(found)) == 1
    assert mine[0].name.startswith(THREAD)
    for _ in range(2):
        background.close()
        idle.close()
    assert set(threading.enumerate()) <= before
