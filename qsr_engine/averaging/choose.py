"""How the ranks of a group average: what is configured, and where they are. All ranks of the run agree on it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.allreduce import AllReduce
from qsr_engine.averaging.buckets import PIECE, Piece, bucket_bytes, joined, pieces_in_place, small_first
from qsr_engine.averaging.compressed import Compressed
from qsr_engine.averaging.cuda_graph import Captured
from qsr_engine.averaging.errors import Group, collective
from qsr_engine.averaging.outer import Outer, OuterStep
from qsr_engine.averaging.reducer import Reducer, all_gather_flat
from qsr_engine.averaging.shared_memory import Offer, SharedMemory, map_offered, offer
from qsr_engine.averaging.two_level import Levels, TwoLevelCollectives, TwoLevelSharedMemory
from qsr_engine.config.averaging import AveragingConfig, OuterConfig
from qsr_engine.config.digest import digest
from qsr_engine.config.strict import ConfigError

_CPU = torch.device("cpu")
_SHM = Path("/dev/shm")  # where torch puts shared storages on Linux


def choose_reducer(
    buckets: Sequence[Tensor],
    group: Group,
    options: AveragingConfig,
    outer: OuterConfig | None = None,
    *,
    device: torch.device = _CPU,
    fragments: Sequence[Sequence[Tensor]] | None = None,
) -> Reducer:
    """The way to the mean of buckets over a group, and beyond it. Every rank of the run calls it at the same time.

    It may move the memory of the buckets: their addresses change, and views on them stay.

    Args:
        device: where the collectives of all ranks run.
        fragments: views of the buckets; no piece has elements of two of them.
    Raises:
        ConfigError: as Captured and agree_on_two_levels().
    """
    plain = outer is None or outer.is_plain_average
    reducer = _choose([buckets] if fragments is None else fragments, group, options, device, join=plain)
    return reducer if outer is None or plain else OuterStep(reducer, Outer(outer, buckets))


def _choose(
    fragments: Sequence[Sequence[Tensor]], group: Group, options: AveragingConfig, device: torch.device, *, join: bool
) -> Reducer:
    """join: a piece may have elements of two buckets, so that most pieces are as large as they may be."""
    capacity = bucket_bytes(options.bucket_mb, group)
    if options.wire_dtype != "fp32":
        capacity = min(capacity, PIECE)
        pieces = [piece for part in fragments for piece in pieces_in_place(small_first(part, capacity), capacity)]
        return Compressed(pieces, group, options.wire_dtype)
    if not options.cuda_graph and (options.shared_memory or options.two_level is True):
        alone = [piece for part in fragments for bucket in part for piece in pieces_in_place([bucket], capacity)]
        by_topology = _by_topology(alone, group, options, device)
        if by_topology is not None:
            return by_topology
    parts = [joined(part) if join else part for part in fragments]
    pieces = [piece for part in parts for piece in pieces_in_place(small_first(part, capacity), capacity)]
    reducer = AllReduce(pieces, group)
    return Captured(reducer, group) if options.cuda_graph else reducer


def _by_topology(
    pieces: Sequence[Piece], group: Group, options: AveragingConfig, device: torch.device
) -> Reducer | None:
    """The way that suits the hosts on which the ranks of the group are; None for the flat one. All ranks call it.

    What ranks tell all others are a few numbers; the rest travels inside a host.
    """
    facts = tell(device, _needed(pieces) if options.shared_memory else _CANNOT)
    hosts = hosts_of(group, facts)
    if agree_on_two_levels(hosts, options.two_level, device):
        shared = all_do(fits(facts, group), device)
        if not shared and options.two_level is not True:
            return None
        levels = Levels.make(hosts, group)
        everywhere = see_one_another(pieces, levels.inside) if shared else None
        if shared and all_do(everywhere is not None, device) and everywhere is not None:
            return TwoLevelSharedMemory(pieces, levels, everywhere)
        return TwoLevelCollectives(pieces, levels) if options.two_level is True else None
    if len(hosts) == 1 and len(hosts[0]) > 1 and fits(facts, group):
        everywhere = see_one_another(pieces, group)
        if all_do(everywhere is not None, _CPU, group) and everywhere is not None:
            return SharedMemory(pieces, group, everywhere)
    return None


# -------------------------------------------------------------------------------------------------------- hosts

_CANNOT = -1  # in place of the bytes that a rank would move into shared memory


def tell(device: torch.device, needed: int) -> Tensor:
    """What every rank of the run says of its host: int64 [ranks, 3] on the CPU.

    The columns: a number that is the same for processes that can open each other's memory and share a network, 0 where
    it cannot be told; the bytes that the rank would move into shared memory, or _CANNOT; those that are free there.
    """
    host = _host()
    mine = torch.tensor([digest({"host": host}) if host else 0, needed, _free()], dtype=torch.int64, device=device)
    facts = mine.new_empty(dist.get_world_size() * len(mine))
    with collective("looking for ranks on the same host", None):
        all_gather_flat(facts, mine)
    return facts.cpu().view(-1, len(mine))


def hosts_of(group: Group, facts: Tensor) -> list[list[int]]:
    """The ranks of the group by host, in the order of the group; empty where a rank cannot tell on which host it is.

    A container or a network namespace counts as a host of its own.

    Args:
        facts: as tell() gives them.
    """
    members = _members(group)
    names = facts[members, 0]
    if not names.all():
        return []
    _, number, counts = torch.unique(names, return_inverse=True, return_counts=True)
    first = torch.full_like(counts, len(members)).scatter_reduce(0, number, torch.arange(len(members)), "amin")
    by_host = members[first[number].argsort(stable=True)]
    return [ranks.tolist() for ranks in torch.split(by_host, counts[first.argsort()].tolist())]


def _members(group: Group) -> Tensor:
    return torch.tensor(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))


def all_do(flag: bool, device: torch.device, group: Group = None) -> bool:
    """Whether every rank of the group gives True; all must call it."""
    told = torch.tensor([int(flag)], dtype=torch.int32, device=device)
    with collective("looking for ranks on the same host", group):
        dist.all_reduce(told, dist.ReduceOp.MIN, group=group)
    return bool(told.item())


def _host() -> tuple[str, ...] | None:
    """The same for processes that can open each other's memory and share a network; None where it cannot be told."""
    try:
        namespaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return (boot, *namespaces, str(os.getuid()))


def is_two_level(hosts: Sequence[Sequence[int]]) -> bool:
    """Whether there are several hosts with the same number of ranks, at least 2, on each."""
    sizes = {len(ranks) for ranks in hosts}
    return len(hosts) > 1 and len(sizes) == 1 and min(sizes) > 1


def agree_on_two_levels(
    hosts: Sequence[Sequence[int]], wanted: Literal["auto", True, False], device: torch.device
) -> bool:
    """Whether the ranks are placed for two levels, and they are wanted. All ranks of the run call it and get the same.

    So all make the same number of groups: torch names a group by how many there are, and later ones would not match.

    Args:
        hosts: the ranks that this rank averages with, and itself, by host; empty where that is not known.
    Raises:
        ConfigError: they are wanted for certain (True) and some ranks of the run are placed otherwise; on every rank.
    """
    if wanted is False:
        return False
    placed = is_two_level(hosts)
    if all_do(placed, device):
        return True
    if wanted is True:
        raise ConfigError(
            "qsr.averaging.two_level is true, which needs several hosts with the same number, at least 2, of the ranks "
            "that average with one another (one of each worker), and they are placed so: "
            f"{_spelled_by_the_first(None if placed else hosts, device)}; start as many workers on every host, or "
            "write two_level 'auto' or false"
        )
    return False


def _spelled_by_the_first(hosts: Sequence[Sequence[int]] | None, device: torch.device) -> str:
    """In words, on every rank, where the ranks are of the first that has something to say."""
    first = torch.tensor([dist.get_world_size() if hosts is None else dist.get_rank()], device=device)
    with collective("looking for ranks on the same host", None):
        dist.all_reduce(first, dist.ReduceOp.MIN)
        places = [f"{len(ranks)} on one host (ranks {', '.join(map(str, ranks))})" for ranks in hosts or []]
        said = ["; ".join(places) or "not known, since /proc does not tell the host"]
        dist.broadcast_object_list(said, int(first.item()), device=device)
    return str(said[0])


# -------------------------------------------------------------------------------------------------- shared memory


def _needed(pieces: Sequence[Piece]) -> int:
    """Bytes that are still to be moved into shared memory for the pieces; _CANNOT on a GPU, and where there is none."""
    if not (all(piece.in_place and piece.device.type == "cpu" for piece in pieces) and _SHM.is_dir()):
        return _CANNOT
    storages = {storage._cdata: storage for storage in (piece.tensors[0].untyped_storage() for piece in pieces)}
    return sum(storage.nbytes() for storage in storages.values() if not storage.is_shared())


def fits(facts: Tensor, group: Group) -> bool:
    """Whether each host of the group's ranks has enough shared memory for all ranks of the run that are on it.

    Args:
        facts: as tell() gives them.
    """
    members = _members(group)
    if (facts[members, 1] == _CANNOT).any() or not facts[members, 0].all():
        return False
    _, number = torch.unique(facts[:, 0], return_inverse=True)
    needed = torch.zeros(int(number.max()) + 1, dtype=torch.int64).scatter_add(0, number, facts[:, 1].clamp(min=0))
    free = torch.full_like(needed, torch.iinfo(torch.int64).max).scatter_reduce(0, number, facts[:, 2], "amin")
    enough = needed <= 0.9 * free
    here = number[dist.get_rank()]
    on_this_host = members[number[members] == here]
    if not enough[here] and on_this_host[0] == dist.get_rank():
        warnings.warn(
            f"{_SHM} has {free[here].item() / 1e6:.0f} MB free and the parameters of this host's ranks need "
            f"{needed[here].item() / 1e6:.0f} MB, so they are averaged through gloo instead of in shared memory; "
            "enlarge it (docker run --shm-size=...), or write averaging.shared_memory: false",
            stacklevel=3,
        )
    return bool(enough[number[members]].all())


def see_one_another(pieces: Sequence[Piece], host: Group) -> list[list[Tensor]] | None:
    """Move the storages of the pieces into shared memory, and map those of the other ranks of a host.

    Every rank of the group must call it. Addresses of the tensors change; their storages and the views on them stay.

    Args:
        host: a group of ranks that are all on one host.
    Returns:
        For every piece its elements in the memory of each rank of the group, in its order; None where it failed, which
        a warning says, here or on another rank.
    """
    mine: Offer | None = None
    try:
        mine = offer(pieces)
    except (OSError, RuntimeError) as error:
        _warn_of(error)
    offers: list[Offer | None] = [None] * dist.get_world_size(host)
    with collective("looking for ranks on the same host", host):
        dist.all_gather_object(offers, mine, group=host)
    found = [offered for offered in offers if offered is not None]
    if len(found) < len(offers):
        return None
    try:
        return [list(copies) for copies in zip(*(map_offered(offered, pieces) for offered in found), strict=True)]
    except (OSError, RuntimeError) as error:
        _warn_of(error)
        return None


def _warn_of(error: Exception) -> None:
    """Too many open files, a hardened kernel, processes of several users."""
    warnings.warn(
        f"parameters cannot be averaged in shared memory, so they are averaged through gloo: {error}", stacklevel=3
    )


def _free() -> int:
    try:
        room = os.statvfs(_SHM)
    except OSError:
        return 0
    return room.f_bavail * room.f_frsize
