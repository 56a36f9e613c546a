"""One worker of `python -m benchmarks.soak --elastic`: a small model on data that it makes, and a line a boundary.

    python -m benchmarks.soak_member FILE STEPS H SECONDS TIMEOUT GRACE      # 0: no grace

RANK and what else a launcher sets is in the environment, and TORCHFT_LIGHTHOUSE.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from typing import Any

import torch
from torch import nn

import qsr_engine

_GONE = ("leave", "missing")


def main(file: str, steps: int, period: int, seconds: float, timeout: float, grace: float) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 16))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 16,
        "gradient_clipping": 0.0,
        "qsr": {
            "strategy": "constant",
            "h_base": period,
            "total_steps": steps,
            "lr": {"schedule": "constant", "peak": 1e-3},
            "membership": {"way": "torchft", "timeout_seconds": timeout, "grace_seconds": grace or None},
        },
    }
    engine = qsr_engine.initialize_fsdp(model=model, optimizer=torch.optim.AdamW, config=config)
    engine.join()
    state, member = engine.local_steps, engine.local_steps.boundary.member
    assert member is not None
    generator = torch.Generator().manual_seed(os.getpid())
    name = member.members.name
    with open(file, "a", buffering=1) as out:

        def say(**what: Any) -> None:
            out.write(json.dumps({"name": name, "time": time.time(), **what}) + "\n")

        say(joined=state.step, taken=[])
        taken = []
        while not state.finished:
            time.sleep(seconds)
            inputs = torch.randn(16, 64, generator=generator)
            loss = nn.functional.mse_loss(engine(inputs), inputs[:, :16].sin())
            engine.backward(loss)
            taken.append(state.step)
            began = time.monotonic()
            if engine.step():
                bits = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters()))
                say(
                    step=state.step,
                    took=time.monotonic() - began,
                    digest=bits.hexdigest()[:16],
                    members=len(engine.standing.names),
                    repeated=member.repeated,
                    taken=[taken[0], taken[-1], len(taken)],
                    recorder=engine.standing.recorder,
                    left=[event["member"] for event in member.events if event["event"] in _GONE],
                    late=[event["member"] for event in member.events if event["event"] == "late"],
                )
                member.events, taken = [], []
        say(finished=state.step)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:7]))
