"""The bytes that leave one worker: at an averaging, and at a step of `parallel`. Pure functions, no torch.

Counted is payload: what the ranks of a worker, all of them together, send to ranks of other workers. Not counted are
the headers of a boundary, norms, overflow flags and barriers (some bytes each), the padding that rounds tensors up to
equal parts, what TCP or the network adds, and what only initialization, a checkpoint or an evaluation sends.

Every collective is taken for a ring over its ranks, ordered by worker. One pass (a reduce-scatter or an all-gather)
carries (n - 1) / n of the payload over every link of a ring of n ranks, an all-reduce is two passes: Patarasuk and
Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009. From it follows what leaves a
worker, of K workers of s ranks each, n = K s:

    over the ranks of a worker                    nothing
    over one rank of each worker (an averaging)   every link leaves its worker: (K - 1) / K of the payload a pass, for
                                                  each of the s places, which hold 1 / s of the masters each where they
                                                  are sharded, and all of them where they are not
    over all ranks (`parallel`, buffers)          one link leaves each worker, whatever s is: (n - 1) / n a pass

Two levels (averaging.two_level) change where bytes go, to the own host or to another, and not how many leave a worker:
with N hosts of L workers 2 (L - 1) / L of the payload inside a host and 2 (N - 1) / (N L) between hosts, together
2 (N L - 1) / (N L), as in the ring over K = N L.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Wire = Literal["fp32", "bf16", "fp16", "int8"]
Elements = Mapping[str, int]  # how many elements there are of each data type, by its name in ELEMENT_BYTES

ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
BLOCK = 512  # elements at most with one scale of 4 bytes, in fp16 and int8; averaging.compressed has the same
PADDING = 1 << 16  # elements by which whole blocks pad a piece at most; averaging.compressed has the same
PIECE = 16_000_000  # bytes of masters that travel as one; averaging.buckets has the same
FIRST = 1 << 20  # bytes of the first pieces; averaging.buckets has the same
LINE = 16  # elements of fp32 in a cache line, on which pieces begin
REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's default of zero_optimization.stage3_max_reuse_distance, in elements


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave this rank's worker, as the engines count them."""

    averaging: int = 0  # of all parameters, once
    state: int = 0  # of one state of the optimizer, where it is averaged as well
    parallel: int = 0  # at one step of `parallel`
    fragments: tuple[int, ...] = ()  # of each fragment of the parameters; () where they are averaged at once

    def of(self, fragments: Collection[int]) -> int:
        """Of the averaging of these fragments of the parameters."""
        return sum(self.fragments[fragment] for fragment in fragments) if self.fragments else self.averaging


def payload(elements: Elements) -> int:
    """Bytes of elements in the types that they have."""
    return sum(count * ELEMENT_BYTES[dtype] for dtype, count in elements.items())


def averaging_bytes(
    masters: Elements,
    workers: int,
    worker_size: int = 1,
    *,
    sharded: bool = True,
    wire: Wire = "fp32",
    states: float = 0,
    buffers: int = 0,
    tensors: Sequence[Sequence[int]] | None = None,
    piece: int = PIECE,
) -> int:
    """Bytes that leave a worker when masters are averaged over the workers.

    Before the switch of `post_local` an engine averages gradients in the same way: then give these for masters.

    Args:
        masters: of the whole model; with the wire "fp32" they travel in their own types.
        sharded: whether each rank of a worker has a part of them (ZeRO 1 to 3, FSDP) or all (stage 0), and sends it.
        wire: averaging.wire_dtype. Of fewer bits, each piece of what travels is rounded up to equal blocks.
        states: how many states of the optimizer are averaged as well, in the masters' types (averaging.state); one that
            is averaged every third round is a third.
        buffers: elements of buffers that are averaged as well, over all ranks and in fp64.
        tensors: elements of each flat tensor that travels by itself, for every rank of a worker; None: one holds all.
        piece: bytes of a tensor that travel as one at most.
    """
    copies = 1 if sharded else worker_size
    plain = 2 * (workers - 1) * copies * payload(masters) // workers
    sent = plain
    if wire != "fp32":
        held = -(-sum(masters.values()) * copies // worker_size)
        of_ranks = [[held]] * worker_size if tensors is None else tensors
        pieces = (part for rank in of_ranks for tensor in small_first(rank, piece) for part in split(tensor, piece))
        sent = sum(exchange_bytes(part, workers, wire) for part in pieces)
    return sent + round(states * plain) + _over_all_ranks(2, buffers * ELEMENT_BYTES["fp64"], workers, worker_size)


def small_first(tensors: Sequence[int], piece: int = PIECE) -> list[int]:
    """Elements of flat tensors of fp32 whose first pieces are small, as averaging.buckets cuts them."""
    cut: list[int] = []
    cuts = 0
    for rest in tensors:
        while (size := FIRST << cuts // 4) < piece and rest * ELEMENT_BYTES["fp32"] >= size + FIRST:
            cut.append(size // ELEMENT_BYTES["fp32"])
            rest -= cut[-1]
            cuts += 1
        cut.append(rest)
    return cut


def split(elements: int, piece: int = PIECE) -> list[int]:
    """Elements of the pieces of one flat tensor of fp32, as averaging.buckets makes them."""
    parts = -(-elements * ELEMENT_BYTES["fp32"] // piece)
    if parts <= 1:
        return [elements] if elements else []
    size = -(-elements // parts)
    size = -(-size // LINE) * LINE
    return [min(size, elements - start) for start in range(0, elements, size)]


def exchange_bytes(elements: int, workers: int, wire: Wire) -> int:
    """Bytes that one rank sends when it averages a piece in a type of fewer bits: all-to-all, then all-gather.

    Each of the workers has a part of the piece, in blocks of one size; see averaging.compressed.
    """
    if not elements:
        return 0
    blocks = -(-elements // (workers * BLOCK))
    line = {"bf16": 1, "fp16": 2, "int8": 4}[wire]  # what the elements of a block are a multiple of
    block = BLOCK if workers * BLOCK <= PADDING else -(-elements // (workers * blocks * line)) * line
    return 2 * (workers - 1) * blocks * (block * ELEMENT_BYTES[wire] + (0 if wire == "bf16" else 4))


def fsdp_parallel_bytes(gradients: Elements, workers: int) -> int:
    """Bytes that leave a worker at one step of `parallel` under FSDP: torch's HSDP, by its device mesh.

    Parameters are gathered and gradients reduced inside a worker, at every micro-batch; after the last one the
    gradients' shards are all-reduced over the workers.

    Args:
        gradients: of the whole model, in the type in which they are reduced.
    """
    return 2 * (workers - 1) * payload(gradients) // workers


def deepspeed_parallel_bytes(
    gradients: Elements,
    workers: int,
    worker_size: int = 1,
    *,
    zero_stage: int = 0,
    gathered: Elements | None = None,
    kept: Elements | None = None,
    accumulation: int = 1,
    gradient_passes: int | None = None,
    reuse_distance: int = REUSE_DISTANCE,
) -> int:
    """Bytes that leave a worker at one step of `parallel` under DeepSpeed, whose collectives are over all ranks.

        stage 0   gradients are all-reduced, once a step
        stage 1   the same; then the parameters are gathered, once a step
        stage 2   the same, with an all-reduce of gradients at every micro-batch
        stage 3   gradients are reduce-scattered at every micro-batch. Parameters are gathered for every forward, and
                  again for the backward where more than reuse_distance elements are used in between, which is so for
                  all but the last reuse_distance / 2; small ones are kept, and gathered once a step, after the update

    Source: DeepSpeed 0.19.8 (stage_1_and_2.py reduces a bucket by all-reduce, and each rank takes its part of it;
    partitioned_param_coordinator.py releases what is not used again soon, from the second step on).

    Args:
        gradients: of the whole model, in the type in which they are reduced (communication_data_type).
        gathered: parameters in the type in which the model computes; at stage 3 also the frozen ones, without those
            that are kept. Stages 1 to 3 need it.
        kept: those that stage 3 keeps (stage3_param_persistence_threshold, by default up to 100,000 elements each).
        accumulation: micro-batches of a step.
        gradient_passes: 2 for an all-reduce, 1 for a reduce-scatter or for a reduce to the rank that needs it; by
            default as above.
    """
    passes = gradient_passes or (1 if zero_stage == 3 else 2)
    sent = passes * payload(gradients) * (accumulation if zero_stage >= 2 else 1)
    if zero_stage > 0:
        if gathered is None:
            raise ValueError(f"gathered is missing, and stage {zero_stage} gathers parameters; give their elements")
        sent += payload(gathered) + payload(kept or {})
    if zero_stage == 3:
        sent += payload(gathered or {}) * (accumulation - 1)
        count = sum((gathered or {}).values())
        again = max(0, count - reuse_distance // 2)
        sent += accumulation * payload(gathered or {}) * again // max(1, count)
    return _over_all_ranks(1, sent, workers, worker_size)


def _over_all_ranks(passes: int, nbytes: int, workers: int, worker_size: int) -> int:
    """Passes of a ring over all ranks: the bytes that the one link carries which leaves a worker."""
    ranks = workers * worker_size
    return passes * (ranks - 1) * nbytes // ranks if workers > 1 else 0


def bytes_percent(sent: float, parallel: float) -> float:
    """What was sent over what `parallel` would have sent, in %; 0 where nothing ever leaves a worker, as with one."""
    return 100 * sent / parallel if parallel else 0.0
