"""The ways of averaging that are compared: of ours, and of others.

The authors' way is written anew from its description; the others are called, where they are installed.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsr_engine.averaging import Averager, average_tensors, bucket_bytes, flat_buckets
from qsr_engine.config.averaging import AveragingConfig
from qsr_engine.local_steps.header import Header, exchange_headers

FLOOR = "raw all-reduce of a flat tensor"
Way = Callable[[], object]


def shapes_of(model: str) -> list[torch.Size]:
    if model == "tiny":
        return [torch.Size([1000])] * 1000
    with torch.device("meta"):
        return [p.shape for p in build(model).parameters()]


def build(model: str) -> nn.Module:
    if model in ("vit", "small"):
        import timm

        size = {"vit": "base", "small": "small"}[model]
        return timm.create_model(f"vit_{size}_patch16_224")  # type: ignore[no-any-return]
    import torchvision

    return torchvision.models.resnet152()  # type: ignore[no-any-return]


def authors(tensors: list[Tensor]) -> Way:
    """The paper's authors: concatenate all, all-reduce, divide, copy back."""

    def way() -> None:
        flat = torch.cat([tensor.view(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    return way


def torch_averager(tensors: list[Tensor]) -> Way:
    from torch.distributed.algorithms.model_averaging.utils import average_parameters

    parameters = [nn.Parameter(tensor) for tensor in tensors]
    return lambda: average_parameters(iter(parameters), dist.group.WORLD)  # type: ignore[arg-type]


def torch_coalesced(tensors: list[Tensor]) -> Way:
    def way() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dist.all_reduce_coalesced(tensors)
        torch._foreach_div_(tensors, dist.get_world_size())

    return way


def accelerate_reduce(tensors: list[Tensor]) -> Way | None:
    """What accelerate's LocalSGD does: reduce every parameter by itself."""
    try:
        from accelerate import Accelerator
    except ImportError:
        return None
    accelerator = Accelerator(cpu=True)
    parameters = [nn.Parameter(tensor) for tensor in tensors]

    def way() -> None:
        for parameter in parameters:
            parameter.data = accelerator.reduce(parameter.data, reduction="mean")

    return way


def torchft_local_sgd(tensors: list[Tensor]) -> Way | None:
    """torchft's own LocalSGD, with a replica a process: a quorum of its lighthouse, its averaging, and its commit.

    Rank 0's process holds the lighthouse, where torchft runs it as a process of its own.
    """
    os.environ.setdefault("RUST_LOG", "error")  # its servers tell every request
    try:
        from torchft.coordination import LighthouseServer
        from torchft.local_sgd import LocalSGD
        from torchft.manager import Manager
        from torchft.process_group import ProcessGroupGloo
    except ImportError:
        return None
    from torch._C._distributed_c10d import TCPStore

    rank, ranks, timeout = dist.get_rank(), dist.get_world_size(), timedelta(seconds=120)
    lighthouse = None if rank else LighthouseServer(bind="127.0.0.1:0", min_replicas=ranks, join_timeout_ms=1000)
    told = [None if lighthouse is None else lighthouse.address()]
    dist.broadcast_object_list(told)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=ranks,
        use_async_quorum=False,
        init_sync=False,
        timeout=timeout,
        quorum_timeout=timeout,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=told[0],
        replica_id=f"worker{rank}",
        hostname="127.0.0.1",
    )
    model = nn.ParameterList([nn.Parameter(tensor) for tensor in tensors])
    local_sgd = LocalSGD(manager, model, torch.optim.SGD(model.parameters()), sync_every=1)

    def way() -> None:
        local_sgd.sync()
        if manager.num_participants() != ranks:
            raise RuntimeError(f"{manager.num_participants()} of {ranks} replicas took part")

    way.servers = lighthouse, store  # type: ignore[attr-defined]  # they live as long as the way
    return way


def boundary(averager: Averager) -> Way:
    """All that a boundary does: finite?, header, averaging, distance."""

    def way() -> None:
        header = Header(1, 1, 0.1, 1, averager.sum_of_squares(), averager.moved())
        met = exchange_headers(header, torch.device("cpu"))
        averager.average()
        averager.relative_distance(met.squares, met.ranks)

    return way


def where_they_are(tensors: list[Tensor]) -> Way:
    return lambda: average_tensors(tensors, None)


def averager_of(shapes: list[torch.Size], **options: Any) -> Averager:
    averaging = AveragingConfig(**{"shared_memory": False, **options})
    buckets = flat_buckets(random_tensors(shapes), bucket_bytes(averaging.bucket_mb, None))
    return Averager(buckets, None, averaging)


def random_tensors(shapes: list[torch.Size]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(shape, generator=generator).mul_(0.05) for shape in shapes]


def ways(shapes: list[torch.Size], only: str) -> dict[str, Callable[[], Way | None]]:
    """Name of every way, and what prepares it. Those of others share one set of tensors."""
    total = sum(shape.numel() for shape in shapes)
    tensors: list[Tensor] = []

    def shared() -> list[Tensor]:
        if not tensors:
            tensors.extend(random_tensors(shapes))
        return tensors

    @functools.cache
    def averager(shared_memory: bool) -> Averager:
        return averager_of(shapes, shared_memory=shared_memory)

    def floor() -> Way:
        flat = torch.randn(total).mul_(0.05)

        def way() -> None:
            dist.all_reduce(flat)

        return way

    found: dict[str, Callable[[], Way | None]] = {FLOOR: floor}
    ours = {
        "qsr: in place, gloo": lambda: averager(False).average,
        "qsr: in place, one flat tensor, gloo": lambda: averager_of([torch.Size([total])]).average,
        "qsr: the whole boundary, gloo": lambda: boundary(averager(False)),
        "qsr: tensors that must not move": lambda: where_they_are(shared()),
        "qsr: bf16 on the wire": lambda: averager_of(shapes, wire_dtype="bf16").average,
        "qsr: fp16 on the wire": lambda: averager_of(shapes, wire_dtype="fp16").average,
        "qsr: int8 on the wire": lambda: averager_of(shapes, wire_dtype="int8").average,
        "qsr: shared memory": lambda: averager(True).average,
        "qsr: the whole boundary, shared memory": lambda: boundary(averager(True)),
    }
    if len(shapes) < 1000:
        del ours["qsr: in place, one flat tensor, gloo"]
    others: dict[str, Callable[[], Way | None]] = {
        "paper's authors": lambda: authors(shared()),
        "torch average_parameters": lambda: torch_averager(shared()),
        "torch coalesced": lambda: torch_coalesced(shared()),
        "accelerate": lambda: accelerate_reduce(shared()),
        "torchft LocalSGD": lambda: torchft_local_sgd(shared()),
    }
    if only == "nothing":
        return found
    if only == "bucket sizes":
        sizes = (1.0, 4.0, 16.0, 25.0, 64.0, 128.0, 256.0)
        return found | {
            f"buckets of {mb:g} MB": lambda mb=mb: averager_of(shapes, bucket_mb=mb).average for mb in sizes
        }
    if only == "link":
        return found | {name: way for name, way in ours.items() if "shared" not in name and "flat" not in name}
    return found | others | ours
