"""torchrun without its report of a rank that failed: `python -m qsr_engine.cli.torchrun` takes torchrun's arguments.

The report is some 35 lines with a traceback of torchrun itself, below what the rank has said. Of a rank that could say
nothing, since a signal ended it, one line tells. The exit code is 1 then, as torchrun's.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

ENDED_BY_THE_AGENT = signal.SIGTERM  # the other ranks, once one has failed


def run(words: list[str]) -> int:
    """Returns the exit code."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(words)
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and failure.exitcode != -ENDED_BY_THE_AGENT:
                name = signal.Signals(-failure.exitcode).name
                print(f"qsr: error: rank {rank} was ended by {name}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
