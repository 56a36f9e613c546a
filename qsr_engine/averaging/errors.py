"""A collective that fails says what was under way, over which ranks, and where to look."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

Group = dist.ProcessGroup | None  # None is the group of all ranks


class CollectiveError(RuntimeError):
    """A collective failed or timed out; the message names what was averaged and over which ranks."""


@contextlib.contextmanager
def collective(what: str, group: Group) -> Iterator[None]:
    """Turn a failure of torch.distributed into a CollectiveError that says what was under way."""
    try:
        yield
    except CollectiveError:
        raise
    except RuntimeError as error:  # torch raises DistBackendError, which is one, and plain RuntimeErrors
        ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        raise CollectiveError(
            f"{what} over the ranks {ranks} failed on rank {dist.get_rank()}: {error}. A rank has died, hangs, or was "
            "not reached within the time-out of the process group; look at the output of the others"
        ) from error
