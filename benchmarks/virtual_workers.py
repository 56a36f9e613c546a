"""The comparison of `benchmarks.generalization` on one GPU: K workers in one process, 200 epochs, bf16, in pieces.

    python -m benchmarks.virtual_workers --data CIFAR10 --runs FOLDER                 # again and again, until it ends
    python -m benchmarks.virtual_workers --data CIFAR10 --runs FOLDER --model vit --seconds 540
    python -m benchmarks.virtual_workers --data CIFAR10 --runs FOLDER \\
        --device cpu --epochs 1 --samples 512 --batch 16 --small                      # a rehearsal

CIFAR10 is a folder of pictures, train/CLASS/*.jpg and test/CLASS/*.jpg. The workers' models take their steps in turn on
one device; position, schedule and rule are the package's own (`Rounds`), the outer step too (`Outer`), and a mean is
the sum over workers divided once. Under `parallel` one model takes the mean of K gradients. ResNet-18 for 32 x 32
pictures or a small vision transformer, in bf16 with fp32 masters; batch norm's statistics are averaged at boundaries.

A process ends after --seconds with status 75 and has kept everything: run it again, it goes on with the same numbers.
Rates are tuned as in `benchmarks.generalization`, a strategy by itself, on 5,000 training pictures that are held back.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import report
from benchmarks.generalization import RATES, STRATEGIES, best_rate, beyond, with_deviation
from benchmarks.report import Report, parser
from qsr_engine.averaging.buckets import pieces_in_place
from qsr_engine.averaging.outer import Outer
from qsr_engine.config.qsr import QSRConfig
from qsr_engine.local_steps.rounds import Rounds

AGAIN = 75  # exit status: run it again
HELD_BACK = 5_000
PEAKS = {"resnet": 0.2, "vit": 0.002}  # for a batch of 1,024 over all workers
Batch = tuple[Tensor, Tensor]


class VirtualWorkers:
    """K models in one process, one after another; under `parallel` a single one.

    Args:
        make_model: gives the same parameters every time.
        make_optimizer: the local optimizer of one worker's parameters.
        qsr: the run.
        loss: of a model and a batch.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        qsr: QSRConfig,
        workers: int,
        loss: Callable[[nn.Module, Batch], Tensor],
    ) -> None:
        self.rounds = Rounds(qsr, lambda: 0.0)
        self._loss = loss
        self.models = [make_model() for _ in range(1 if qsr.strategy == "parallel" else workers)]
        self._parameters = [list(model.parameters()) for model in self.models]
        self._optimizers = [make_optimizer(parameters) for parameters in self._parameters]
        self._bucket = torch.cat([parameter.detach().flatten() for parameter in self._parameters[0]])
        self._outer = Outer(qsr.outer, [self._bucket]) if qsr.outer else None
        self._together = self.rounds.mode == "parallel"
        self.averagings = 0

    def step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step of every worker, each on its own batch; at the end of a round the average."""
        rounds = self.rounds
        if self._together and rounds.mode == "local":
            self._together = False
            self._take(self._bucket)
            if self._outer:
                self._outer.begin_round()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        for worker, batch in enumerate(batches):
            loss = self._loss(self.models[worker % len(self.models)], batch) / self._share(batches)
            loss.backward()  # type: ignore[no-untyped-call]
        if self._together and len(self.models) > 1:
            self._average_gradients()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rounds.learning_rate
            optimizer.step()
        rounds.step += 1
        if rounds.at_end:
            self.averagings += 1
            if rounds.mode == "local":
                self._average()
            if not rounds.finished:
                rounds.begin_next()

    def _share(self, batches: Sequence[Batch]) -> int:
        return len(batches) // len(self.models)

    @torch.no_grad()
    def _average_gradients(self) -> None:
        for same in zip(*self._parameters, strict=True):
            gradients = [parameter.grad for parameter in same if parameter.grad is not None]
            mean = _mean(gradients)
            for gradient in gradients:
                gradient.copy_(mean)

    @torch.no_grad()
    def _take(self, into: Tensor) -> None:
        """The workers' mean."""
        means = [_mean([parameter.detach() for parameter in same]) for same in zip(*self._parameters, strict=True)]
        torch.cat([mean.flatten() for mean in means], out=into)

    @torch.no_grad()
    def _average(self) -> None:
        self._take(self._bucket)
        if self._outer:
            self._outer.round_lasted(self.rounds.units)
            for piece in pieces_in_place([self._bucket], self._bucket.nbytes):
                self._outer.step(piece)
        for parameters in self._parameters:
            parts = torch.split(self._bucket, [parameter.numel() for parameter in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.copy_(part.view_as(parameter))
        for same in zip(*(model.buffers() for model in self.models), strict=True):
            if same[0].is_floating_point():
                mean = _mean(same)
                for buffer in same:
                    buffer.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds.state_dict(),
            "averagings": self.averagings,
            "models": [model.state_dict() for model in self.models],
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "outer": self._outer.state_dict(inside_round=True) if self._outer else None,
            "together": self._together,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds.load_state_dict(state["rounds"])
        self.averagings, self._together = state["averagings"], state["together"]
        parts: list[tuple[str, Sequence[Any]]] = [("models", self.models), ("optimizers", self._optimizers)]
        for name, ours in parts:
            for one, saved in zip(ours, state[name], strict=True):
                one.load_state_dict(saved)
        if self._outer:
            self._outer.load_state_dict(state["outer"], inside_round=True)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return sum(tensors[1:], start=tensors[0].clone()).div_(len(tensors))


# ---------------------------------------------------------------------------------------------- pictures and models


@cache
def load_pictures(folder: Path, split: str, device: torch.device) -> Batch:
    """uint8 [N, 3, 32, 32] and labels [N] on the device; decoded once, and kept beside the pictures."""
    import numpy as np
    from PIL import Image

    kept = folder / f"{split}.pt"
    if not kept.exists():
        names = sorted(path.name for path in (folder / split).iterdir() if path.is_dir())
        paths = [(label, p) for label, name in enumerate(names) for p in sorted((folder / split / name).glob("*.jpg"))]
        pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for _, path in paths])
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([label for label, _ in paths])
        _save((torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()[order], labels[order]), kept)
    pixels, labels = torch.load(kept)
    return pixels.to(device), labels.to(device)


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture moved by up to 4 pixels and turned round by chance, normalised."""
    count, device = len(pixels), pixels.device
    moves = torch.randint(9, (2, count), generator=generator, device=device)
    turned = torch.rand(count, generator=generator, device=device) < 0.5
    rows = torch.arange(32, device=device)
    columns = torch.where(turned[:, None], rows.flip(0), rows) + moves[1][:, None]
    padded = F.pad(pixels, (4, 4, 4, 4))
    picture = torch.arange(count, device=device)[:, None, None]
    taken = padded.permute(0, 2, 3, 1)[picture, (rows + moves[0][:, None])[:, :, None], columns[:, None]]
    return normalised(taken.permute(0, 3, 1, 2))


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - 0.47) / 0.25


def make_model(name: str, seed: int, small: bool) -> nn.Module:
    """ResNet-18 without the strides of its stem, or a vision transformer of 4 x 4 patches; small ones to rehearse."""
    from timm.models.resnet import BasicBlock, ResNet
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    if name == "vit":
        sizes = (48, 2, 3) if small else (192, 9, 3)
        transformer: nn.Module = VisionTransformer(
            img_size=32, patch_size=4, num_classes=10, embed_dim=sizes[0], depth=sizes[1], num_heads=sizes[2]
        )
        return transformer
    shape: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)} if small else {"layers": (2, 2, 2, 2)}
    made: nn.Module = ResNet(BasicBlock, num_classes=10, **shape)
    made.conv1, made.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return made


def make_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "vit":
        return torch.optim.AdamW(parameters, weight_decay=0.05)
    return torch.optim.SGD(parameters, momentum=0.9, weight_decay=5e-4)


# ------------------------------------------------------------------------------------------------------- the runs


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every run of the comparison gets; `until` is the clock after which nothing goes on."""

    model: str
    data: Path
    runs: Path
    device: torch.device
    workers: int
    batch: int
    epochs: int
    samples: int
    small: bool
    until: float


class OutOfTimeError(Exception):
    """Everything is kept; the next process goes on."""


def accuracy(plan: Plan, strategy: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """Of the averaged model after a run, in per cent, on the test pictures or on those held back ("tune")."""
    folder = plan.runs / f"{plan.model}-{strategy}-lr{rate:g}-{split}-seed{seed}"
    done = folder / "summary.json"
    if done.exists():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = load_pictures(plan.data, "train", plan.device)
    training = min(plan.samples, len(labels) - HELD_BACK) if len(labels) > HELD_BACK else len(labels) // 2
    held = (
        (pixels[-HELD_BACK:], labels[-HELD_BACK:])
        if len(labels) > HELD_BACK
        else (pixels[training:], labels[training:])
    )
    workers = _workers(plan, strategy, rate, seed, training)
    _train(plan, workers, (pixels[:training], labels[:training]), seed, folder / "state.pt")
    model = workers.models[0].eval()
    shown = held if split == "tune" else load_pictures(plan.data, "test", plan.device)
    right = 0
    with torch.no_grad(), torch.autocast(plan.device.type, torch.bfloat16):
        for part, truth in zip(torch.split(shown[0], 1000), torch.split(shown[1], 1000), strict=True):
            right += int((model(normalised(part)).argmax(1) == truth).sum())
    percent = 100 * workers.averagings / workers.rounds.step
    result = {"accuracy": 100 * right / len(shown[1]), "averagings_percent": percent}
    done.write_text(json.dumps(result))
    (folder / "state.pt").unlink(missing_ok=True)
    return result


def _workers(plan: Plan, strategy: str, rate: float, seed: int, samples: int) -> VirtualWorkers:
    peak, steps = PEAKS[plan.model] * rate, samples // (plan.workers * plan.batch) * plan.epochs
    block = dict(STRATEGIES[strategy])
    if "alpha" in block:
        block["alpha"] *= peak
    if "switch" in block:
        block["switch_step"] = round(block.pop("switch") * steps)
    lr = {"schedule": "cosine", "peak": peak, "min": 1e-6, "warmup_steps": round(0.05 * steps)}
    return VirtualWorkers(
        lambda: make_model(plan.model, seed, plan.small).to(plan.device),
        lambda parameters: make_optimizer(plan.model, parameters),
        QSRConfig(**block, total_steps=steps, lr=lr),  # type: ignore[arg-type]
        plan.workers,
        lambda model, batch: _loss(model, batch, plan.device),
    )


def _loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16):
        return F.cross_entropy(model(batch[0]).float(), batch[1])


def _train(plan: Plan, workers: VirtualWorkers, pictures: Batch, seed: int, kept: Path) -> None:
    """To the end, from what was kept. Raises OutOfTimeError once it is kept again."""
    pixels, labels = pictures
    if kept.exists():
        workers.load_state_dict(torch.load(kept, map_location=plan.device))
    size = plan.workers * plan.batch
    of_epoch = len(labels) // size
    while not workers.rounds.finished:
        step = workers.rounds.step
        epoch, place = divmod(step, of_epoch)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1_000 * seed + epoch))
        chosen = order[place * size : (place + 1) * size].to(plan.device)
        generator = torch.Generator(plan.device).manual_seed(1_000_003 * seed + step)  # so nothing of it is kept
        seen = augmented(pixels[chosen], generator)
        workers.step(list(zip(torch.split(seen, plan.batch), torch.split(labels[chosen], plan.batch), strict=True)))
        if time.monotonic() > plan.until and not workers.rounds.finished:
            _save(workers.state_dict(), kept)
            raise OutOfTimeError


def _save(what: Any, path: Path) -> None:
    """Whole or not there."""
    torch.save(what, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def tuned(plan: Plan, strategy: str) -> dict[float, float]:
    """Accuracy on what was held back at each factor of the rate that was tried."""
    tried: dict[float, float] = {}
    more: list[float] = list(RATES)
    while more:
        tried |= {rate: accuracy(plan, strategy, rate, 0, "tune")["accuracy"] for rate in more}
        following = beyond(tried)
        more = [] if following is None else [following]
    return tried


def check_same(plan: Plan) -> None:
    """Raises SystemExit where the folder has runs of another length or size, which would be taken for these."""
    kept = plan.runs / "settings.json"
    keys = ("workers", "batch", "epochs", "samples", "small")
    settings = {key: getattr(plan, key) for key in keys}
    if not kept.exists():
        plan.runs.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(settings))
    found = json.loads(kept.read_text())
    others = [f"{key} was {found[key]} and is {settings[key]}" for key in keys if found[key] != settings[key]]
    if others:
        sys.exit(f"{plan.runs}: it has runs in which {', '.join(others)}; write the same, or another --runs")


def main() -> None:
    made = parser(__doc__)
    made.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="train/CLASS/*.jpg and test/CLASS/*.jpg"
    )
    made.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="of all runs; what ran is kept there")
    made.add_argument("--model", choices=list(PEAKS), default="resnet")
    made.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    made.add_argument("--workers", type=int, default=8)
    made.add_argument("--batch", type=int, default=128, help="of a worker")
    made.add_argument("--epochs", type=int, default=200)
    made.add_argument("--samples", type=int, default=45_000)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--device", default="cuda")
    made.add_argument("--seconds", type=float, default=540, help="after which a process ends, to be run again")
    made.add_argument("--small", action="store_true", help="tiny models, to rehearse on a CPU")
    arguments = made.parse_args()
    names = [field.name for field in dataclasses.fields(Plan) if field.name not in ("until", "device")]
    plan = Plan(
        **{name: getattr(arguments, name) for name in names},
        device=torch.device(arguments.device),
        until=time.monotonic() + arguments.seconds,
    )
    if plan.samples < plan.workers * plan.batch:
        made.error(
            f"--samples {plan.samples} fill no step of {plan.workers} workers with a batch of {plan.batch}; write "
            f"at least {plan.workers * plan.batch}, or a smaller --batch"
        )
    check_same(plan)
    lines = []
    try:
        for strategy in arguments.strategies:
            rates = tuned(plan, strategy)
            rate = best_rate(rates)
            found = [accuracy(plan, strategy, rate, seed, "test") for seed in range(arguments.seeds)]
            edge = "" if min(rates) < rate < max(rates) else " (edge)"
            figures = [with_deviation([one["accuracy"] for one in found], 2), f"{found[0]['averagings_percent']:.2f}"]
            lines.append([strategy, f"{PEAKS[plan.model] * rate:g}{edge}", *figures])
    except OutOfTimeError:
        print("kept; run it again to go on", flush=True)
        sys.exit(AGAIN)
    kept = Report("virtual-workers", arguments, ("torch", "timm"))
    kept.add(report.table(["strategy", "peak rate", "accuracy %", "averagings %"], lines))
    kept.save(rows=lines)


if __name__ == "__main__":
    main()
