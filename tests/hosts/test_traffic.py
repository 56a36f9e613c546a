"""Two workers of two ranks, each worker on a host of its own: what the hosts' ports count, and what the engines say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import PREFIX, SCRIPT

pytestmark = pytest.mark.launch

STEPS = 6
STRATEGIES: dict[str, dict[str, Any]] = {
    "parallel": {"strategy": "parallel"},
    "local": {"strategy": "constant", "h_base": 2, "averaging": {"wire_dtype": "int8", "state": ["exp_avg"]}},
}


def main() -> None:
    """On every rank: train by each strategy, and print what left this host and what the engine says left the worker.

    The first step is left out: ranks connect in it, and stage 1 makes its buffers.
    """
    import torch
    import torch.distributed as dist
    from torch import nn

    import qsr_engine
    from tests.support import training

    counter = Path("/sys/class/net/eth0/statistics/tx_bytes")
    found = {}
    for name, strategy in STRATEGIES.items():
        block = {"lr": {"schedule": "constant", "peak": 1e-3}, "total_steps": STEPS, "worker_size": 2, **strategy}
        config = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
        model = nn.Sequential(nn.Linear(1024, 2048, bias=False), nn.Linear(2048, 1024, bias=False))
        engine = qsr_engine.initialize(
            model=model,
            optimizer=partial(training.make_optimizer, "adamw"),
            config={**config, "zero_allow_untested_optimizer": True, "qsr": block},
        )[0]
        for step in range(STEPS):
            if step == 1:
                dist.barrier()
                began, said = int(counter.read_text()), engine.local_steps.bytes_sent
            engine.backward(engine(torch.ones(2, 1024, dtype=torch.bfloat16)).float().square().mean())
            engine.step()
        dist.barrier()
        found[name] = [int(counter.read_text()) - began, engine.local_steps.bytes_sent - said]
    print(json.dumps(found))


@pytest.mark.slow
def test_the_ports_count_what_the_engines_say(cluster: dict[str, str]) -> None:
    """`parallel` goes round all four ranks, averagings between those with the same part of the masters.

    Above the payload: 66 bytes of headers for at most 1,448 of payload, 4.6 % if the kernel merged no segments;
    acknowledgements of what the other host sends, one of 66 bytes for two segments, 2.3 %; the boundaries' headers,
    norms and overflow flags, some kilobytes. All of it came to 0.2 %.
    """
    started = []
    for rank in range(4):
        ranks = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "MASTER_PORT": 29500, "QSR_HOST": rank // 2 + 1}
        known = {**os.environ, **cluster, **{name: str(value) for name, value in ranks.items()}}
        known |= {"MASTER_ADDR": f"{PREFIX}1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        words = [str(SCRIPT), "run", sys.executable, "-m", "tests.hosts.test_traffic"]
        known["PYTHONPATH"] = str(Path(__file__).parents[2])
        started.append(subprocess.Popen(words, env=known, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=240)[0] for process in started]
    for lines in said:
        for name, (counted, sent) in json.loads(lines.splitlines()[-1]).items():
            assert sent > 10_000_000, name
            assert 1 <= counted / sent < 1.07, name


if __name__ == "__main__":
    main()
