"""A rank that stays away from a collective until the others have given it up."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

# torch 2.14 calls it so, and warns of the name that 2.11 has.
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout


def soon_given_up(group: Any) -> None:
    """From now on the ranks of a group wait for two seconds; all of them call it.

    Not from the start: a busy machine may start ranks further apart than that.
    """
    dist.barrier(group)
    _set_timeout(timedelta(seconds=2), group)


def give_up(rank: int) -> None:
    """Tell whoever stays away that this rank waits no more."""
    dist.distributed_c10d._get_default_store().set(f"given up by {rank}", "")


def stay_away(*ranks: int) -> None:
    """Until these ranks have given this one up."""
    dist.distributed_c10d._get_default_store().wait([f"given up by {rank}" for rank in ranks], timedelta(seconds=50))
