"""Buffers that a checkpoint has by name, and a model has not yet."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsr_engine.checkpoint.buffers import kept_buffers, make_room, put_buffers
from qsr_engine.checkpoint.manifest import CheckpointError

CPU = torch.device("cpu")


def model() -> nn.Module:
    made = nn.Sequential(nn.BatchNorm1d(2), nn.Identity())
    made.register_buffer("none", None)
    setattr(made.get_submodule("1"), "later", None)  # noqa: B010 - mypy
    return made


def test_what_is_new_is_made_and_the_rest_is_filled() -> None:
    saved = model()
    del saved.get_submodule("1").later
    saved.get_submodule("1").register_buffer("later", torch.ones(2), persistent=False)
    saved.register_buffer("none", torch.full((3,), 2.0))
    saved.get_submodule("0").register_buffer("running_mean", torch.full((4,), 3.0))  # of another shape
    loaded = model()
    make_room(loaded, kept_buffers(saved), CPU)
    put_buffers(loaded, kept_buffers(saved))
    expected, found = (dict(part.named_buffers()) for part in (saved, loaded))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    found["none"].zero_()
    assert saved.get_buffer("none").all(), "a copy"


def test_what_has_no_place_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    saved, loaded = model(), nn.Sequential(nn.BatchNorm1d(2))
    del saved.get_submodule("1").later
    saved.get_submodule("1").register_buffer("later", torch.ones(2))
    saved.register_buffer("training_mask", torch.ones(1))
    setattr(loaded, "training_mask", "mine")  # noqa: B010
    make_room(loaded, kept_buffers(saved), CPU)
    put_buffers(loaded, kept_buffers(saved))
    assert [record.args for record in caplog.records] == [("training_mask",), ("1.later",)]
    assert loaded.training_mask == "mine"


def test_a_list_without_names_as_older_versions_wrote_it() -> None:
    saved, loaded = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    values = [torch.full_like(buffer, 5) for buffer in saved.buffers()]
    make_room(loaded, values, CPU)
    put_buffers(loaded, values)
    assert all(bool((buffer == 5).all()) for buffer in loaded.buffers())
    with pytest.raises(CheckpointError, match=r"the model has 3 buffers, and .* has 2 without their names; .* run one"):
        put_buffers(loaded, values[:2])
