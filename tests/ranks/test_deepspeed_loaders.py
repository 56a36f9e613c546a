"""DeepSpeed's loaders under local steps: another order in every pass, resumed in the right place."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tests.support import training
from tests.support.deepspeed_engine import start
from tests.support.pool import Processes
from tests.support.training import QSR

SAMPLES = 36  # 18 a rank: two batches of 8 and one of 2


class Numbered(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        inputs, targets = training.batch(0, number, dtype=torch.float32)
        return number, inputs[0], targets[0]


def loader_job(folder: str, load: bool, repeating: bool) -> tuple[list[list[int]], float]:
    """The samples of each micro-batch up to step 6, two a step, and a random number of training afterwards."""
    from deepspeed.runtime.dataloader import RepeatingLoader

    engine = start(QSR, gradient_accumulation_steps=2)
    loader = engine.deepspeed_io(Numbered(), num_local_io_workers=0)
    batches: Any = RepeatingLoader(loader) if repeating else (batch for _ in range(4) for batch in loader)
    if load:
        engine.load_checkpoint(folder)
    seen = []
    while engine.local_steps.step < 6:
        numbers, inputs, targets = next(batches)
        seen.append(numbers.tolist())
        engine.backward(training.loss(engine(inputs), targets))
        if engine.step() and engine.local_steps.step == 4 and not load:
            engine.save_checkpoint(folder)
    return seen, float(torch.rand(()))


def test_every_pass_has_another_order_and_goes_on_where_it_was(processes: Processes, tmp_path: Path) -> None:
    """Step 4 ends in the middle of the third pass."""
    for number, repeating in enumerate((False, True)):
        job: dict[str, Any] = {"folder": str(tmp_path / str(number)), "repeating": repeating}
        whole = processes.run(loader_job, load=False, **job)
        passes = [[list(chain(*seen[start : start + 3])) for start in (0, 3, 6, 9)] for seen, _ in whole]
        for one, other in zip(*passes, strict=True):
            assert sorted(one + other) == list(range(SAMPLES)), "every sample once a pass"
        assert len({tuple(order) for order in passes[0]}) == 4
        resumed = processes.run(loader_job, load=True, **job)
        assert [(seen[8:], random) for seen, random in whole] == resumed
