"""How the ranks of a group average: what is configured, and where they are. All ranks of the run agree on it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor

from qsr_engine.averaging.allreduce import AllReduce
from qsr_engine.averaging.buckets import PIECE, Piece, bucket_bytes, pieces_in_place
from qsr_engine.averaging.compressed import Compressed
from qsr_engine.averaging.cuda_graph import Captured
from qsr_engine.averaging.errors import Group, collective
from qsr_engine.averaging.outer import Outer, OuterStep
from qsr_engine.averaging.reducer import Reducer
from qsr_engine.averaging.shared_memory import Offer, SharedMemory, map_offered, offer
from qsr_engine.averaging.two_level import Levels, TwoLevelCollectives, TwoLevelSharedMemory
from qsr_engine.config.qsr import AveragingConfig, OuterConfig
from qsr_engine.config.strict import ConfigError

_SHM = Path("/dev/shm")  # where torch puts shared storages on Linux


def choose_reducer(
    buckets: Sequence[Tensor], group: Group, options: AveragingConfig, outer: OuterConfig | None = None
) -> Reducer:
    """The way to the mean of buckets over a group, and beyond it. Every rank of the run calls it at the same time.

    It may move the memory of the buckets: their addresses change, and views on them stay.

    Raises:
        ConfigError: as Captured and agree_on_two_levels().
    """
    reducer = _choose(buckets, group, options)
    return reducer if outer is None or outer.is_plain_average else OuterStep(reducer, Outer(outer, buckets))


def _choose(buckets: Sequence[Tensor], group: Group, options: AveragingConfig) -> Reducer:
    capacity = bucket_bytes(options.bucket_mb, group)
    if options.wire_dtype != "fp32":
        return Compressed(_each_alone(buckets, min(capacity, PIECE)), group, options.wire_dtype)
    if not options.cuda_graph and (options.shared_memory or options.two_level is True):
        by_topology = _by_topology(_each_alone(buckets, capacity), group, options)
        if by_topology is not None:
            return by_topology
    reducer = AllReduce(pieces_in_place(buckets, capacity), group)
    return Captured(reducer, group) if options.cuda_graph else reducer


def _each_alone(buckets: Sequence[Tensor], capacity: int) -> list[Piece]:
    return [piece for bucket in buckets for piece in pieces_in_place([bucket], capacity)]


def _by_topology(pieces: Sequence[Piece], group: Group, options: AveragingConfig) -> Reducer | None:
    """The way that suits the hosts on which the ranks of the group are; None for the flat one. All ranks call it."""
    hosts = hosts_of(group)
    two_level = agree_on_two_levels(hosts, options.two_level)
    one_host = len(hosts) == 1 and len(hosts[0]) > 1
    everywhere = see_one_another(pieces, hosts if options.shared_memory and (one_host or two_level) else [])
    if everywhere and one_host:
        return SharedMemory(pieces, group, everywhere)
    if two_level and all(gather(everywhere is not None)) and everywhere is not None:
        return TwoLevelSharedMemory(pieces, Levels.make(hosts, group), everywhere)
    if options.two_level is True:
        return TwoLevelCollectives(pieces, Levels.make(hosts, group))
    return None


# -------------------------------------------------------------------------------------------------------- hosts


def hosts_of(group: Group) -> list[list[int]]:
    """The ranks of the group by host, in the order of the group; empty where a rank cannot tell on which host it is.

    Every rank of the run must call it. A container or a network namespace counts as a host of its own.
    """
    names = gather(_host())
    members = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    if any(names[rank] is None for rank in members):
        return []
    found: dict[Any, list[int]] = {}
    for rank in members:
        found.setdefault(names[rank], []).append(rank)
    return list(found.values())


def gather(value: Any) -> list[Any]:
    """What each rank of the run gives, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    with collective("looking for ranks on the same host", None):
        dist.all_gather_object(values, value)
    return values


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


def agree_on_two_levels(hosts: Sequence[Sequence[int]], wanted: Literal["auto", True, False]) -> bool:
    """Whether the ranks are placed for two levels, and they are wanted. All ranks of the run call it and get the same.

    So all make the same number of groups: torch names a group by how many there are, and later ones would not match.

    Args:
        hosts: the ranks that this rank averages with, and itself, by host; empty where that is not known.
    Raises:
        ConfigError: they are wanted for certain (True) and some ranks of the run are placed otherwise; on every rank.
    """
    if wanted is False:
        return False
    layouts: list[list[list[int]]] = gather([list(ranks) for ranks in hosts])
    other = next((layout for layout in layouts if not is_two_level(layout)), None)
    if other is not None and wanted is True:
        places = "; ".join(f"{len(ranks)} on one host (ranks {', '.join(map(str, ranks))})" for ranks in other)
        raise ConfigError(
            "qsr.averaging.two_level is true, which needs several hosts with the same number, at least 2, of the ranks "
            "that average with one another (one of each worker), and they are placed so: "
            f"{places or 'not known, since /proc does not tell the host'}; start as many workers on every host, or "
            "write two_level 'auto' or false"
        )
    return other is None


# -------------------------------------------------------------------------------------------------- shared memory


def see_one_another(pieces: Sequence[Piece], hosts: Sequence[Sequence[int]]) -> list[list[Tensor]] | None:
    """Move the storages of the pieces into shared memory, and map those of the other ranks of this host.

    Every rank of the run must call it. Addresses of the tensors change; their storages and the views on them stay.

    Args:
        hosts: the ranks that must agree on it, by host; empty to take part and to share nothing.
    Returns:
        For every piece its elements in the memory of each rank of this host, as in `hosts`. Where it cannot be done on
        every host, None: on a GPU, or where /dev/shm is too small, which a warning says.
    """
    members = [rank for host in hosts for rank in host]
    here = next((host for host in hosts if dist.get_rank() in host), [])
    storages = {storage._cdata: storage for storage in (piece.tensors[0].untyped_storage() for piece in pieces)}
    possible = all(piece.in_place and piece.device.type == "cpu" for piece in pieces) and _SHM.is_dir() and bool(hosts)
    needed = sum(storage.nbytes() for storage in storages.values() if not storage.is_shared())
    shared = _fits(gather({"host": _host() if possible else None, "needed": needed, "free": _free()}), hosts)
    mine: Offer | None = None
    try:
        mine = offer(pieces) if shared else None
    except (OSError, RuntimeError) as error:
        _warn_of(error)
    offers = gather(mine)
    everywhere: list[list[Tensor]] | None = None
    try:
        if shared and all(offers[rank] is not None for rank in members):
            mapped = [map_offered(offers[rank], pieces) for rank in here]
            everywhere = [list(copies) for copies in zip(*mapped, strict=True)]
    except (OSError, RuntimeError) as error:
        _warn_of(error)
    opened = gather(everywhere is not None)
    return everywhere if all(opened[rank] for rank in members) else None


def _warn_of(error: Exception) -> None:
    """Too many open files, a hardened kernel, processes of several users."""
    warnings.warn(
        f"parameters cannot be averaged in shared memory, so they are averaged through gloo: {error}", stacklevel=3
    )


def _fits(facts: Sequence[dict[str, Any]], hosts: Sequence[Sequence[int]]) -> bool:
    """Whether each of the hosts has enough shared memory for all ranks of the run that are on it."""
    fits = bool(hosts)
    for ranks in hosts:
        name = facts[ranks[0]]["host"]
        if any(facts[rank]["host"] is None for rank in ranks):
            return False
        on_it = [fact for fact in facts if fact["host"] == name]
        needed, free = sum(fact["needed"] for fact in on_it), min(fact["free"] for fact in on_it)
        fits = fits and needed <= 0.9 * free
        if needed > 0.9 * free and dist.get_rank() == ranks[0]:
            warnings.warn(
                f"{_SHM} has {free / 1e6:.0f} MB free and the parameters of this host's ranks need "
                f"{needed / 1e6:.0f} MB, so they are averaged through gloo instead of in shared memory; enlarge it "
                "(docker run --shm-size=...), or write averaging.shared_memory: false",
                stacklevel=3,
            )
    return fits


def _free() -> int:
    try:
        room = os.statvfs(_SHM)
    except OSError:
        return 0
    return room.f_bavail * room.f_frsize
