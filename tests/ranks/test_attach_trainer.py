"""attach() around Hugging Face's Trainer with its own DeepSpeed integration, at any step.

Trainer goes through Accelerate, which asks for a GPU before it starts DeepSpeed on several ranks:
`accelerate_without_gpu` stands in for that question alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support import training
from tests.support.attached import accelerate_without_gpu
from tests.support.counting import collectives_across_workers
from tests.support.heard import messages_of_this_job
from tests.support.own_parameters import own_parameters
from tests.support.pool import Processes

CONSTANT: dict[str, Any] = {"strategy": "constant", "h_base": 4, "total_steps": 12}
BATCH = 4


class Net(nn.Module):
    """Takes keywords, as language models do, so that Trainer counts what it divides the loss by."""

    def __init__(self) -> None:
        super().__init__()
        self.net = training.make_model(torch.float32)
        self.dropout = nn.Dropout(0.1)

    def forward(
        self, x: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None, **options: Any
    ) -> dict[str, Tensor]:
        outputs = self.net(self.dropout(x))
        total = (outputs - labels).square().sum()
        return {"loss": total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)}


def samples(number: int) -> list[dict[str, Tensor]]:
    batches = [training.batch(0, step, dtype=torch.float32) for step in range(-(-number // training.BATCH))]
    return [{"x": x, "labels": y} for batch in batches for x, y in zip(*batch, strict=True)][:number]


EVALUATED = samples(16)


def make_trainer(folder: str, stage: int, qsr: dict[str, Any], data: int = 96, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {**dict.fromkeys(auto, "auto"), "zero_optimization": {"stage": stage}, "qsr": qsr}
    quiet: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=config,
        per_device_train_batch_size=BATCH,
        learning_rate=0.01,
        dataloader_pin_memory=False,
        **{**quiet, **options},
    )

    class Watched(Trainer):
        """Keeps what it holds after every step, and counts what it meets others for."""

        def __init__(self) -> None:
            super().__init__(Net(), arguments, train_dataset=samples(data), eval_dataset=EVALUATED)
            self.deepspeed: Any
            self.held: dict[int, Tensor] = {}
            self.collectives: dict[int, int] = {}
            self.expected: dict[int, float] = {}
            self.averages: dict[int, dict[str, Tensor]] = {}

        def get_batch_samples(self, *args: Any) -> Any:
            self.before = collectives_across_workers(worker_size=1)
            return super().get_batch_samples(*args)

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            step = self.state.global_step
            if step not in self.held:  # it asks at the end of an epoch too
                self.collectives[step] = collectives_across_workers(worker_size=1) - self.before
                self.held[step] = masters(self.deepspeed)
            super()._maybe_log_save_evaluate(*args, **kwargs)

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            """What it is to find: the loss of the average, which is computed here from what the workers hold."""
            step = self.deepspeed.local_steps.step
            average = {}
            for name, value in own_parameters(self.deepspeed).items():
                torch.distributed.all_reduce(value)
                average[name] = value.div(2).float()
            model = Net().eval()
            model.load_state_dict(average)
            batch = {key: torch.stack([sample[key] for sample in EVALUATED]) for key in ("x", "labels")}
            self.expected[step], self.averages[step] = model(**batch)["loss"].item(), average
            with torch.random.fork_rng(devices=[]):  # a DataLoader draws a number, whoever trains
                return super().evaluate(*args, **kwargs)

    return Watched()


def masters(engine: Any) -> Tensor:
    return training.flat(engine._driver.replica.masters()).clone()


def train(trainer: Any, **options: Any) -> Any:
    import qsr_engine

    with qsr_engine.attach():
        trainer.train(**options)
        assert trainer.deepspeed.local_steps.on_boundary, "so that whoever reads the model next reads the average"
    return trainer


def any_step_job(stage: int, folder: str) -> dict[str, Any]:
    """A run that is left alone; one that is saved and evaluated inside rounds; and one that goes on from there."""
    said = messages_of_this_job()
    with accelerate_without_gpu():
        alone = train(make_trainer(f"{folder}/alone", stage, CONSTANT, max_steps=12))
        options: dict[str, Any] = {
            "max_steps": 12,
            "eval_strategy": "steps",
            "eval_steps": 5,
            "eval_on_start": True,
            "save_strategy": "steps",
            "save_steps": 5,
            "load_best_model_at_end": True,
            "greater_is_better": True,  # so that it is step 0 or 5, and only 5 is saved
        }
        trainer = train(make_trainer(f"{folder}/saved", stage, CONSTANT, **options))
        engine = trainer.deepspeed
        resumed = train(
            make_trainer(f"{folder}/alone", stage, CONSTANT, max_steps=12),
            resume_from_checkpoint=f"{folder}/saved/checkpoint-5",
        )
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    return {
        "alone": alone.held,
        "saved": trainer.held,
        "resumed": resumed.held,
        "collectives": alone.collectives,
        "logged": logged,
        "expected": trainer.expected,
        "average": trainer.averages[5],
        "best": own_parameters(engine),
        "stands": (engine.local_steps.step, engine.local_steps.on_boundary),
        "said": said,
    }


@pytest.mark.fast_cells(1)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_trainer_saves_and_evaluates_inside_rounds(processes: Processes, tmp_path: Path, stage: int) -> None:
    first, second = processes.run(any_step_job, stage=stage, folder=str(tmp_path))
    for result in (first, second):
        assert list(result["alone"]) == list(result["saved"]) == list(range(1, 13))
        assert list(result["resumed"]) == list(range(6, 13))
        for trace in ("saved", "resumed"):
            for step, held in result[trace].items():
                assert torch.equal(held, result["alone"][step]), f"{trace}, step {step}"
        assert {step for step, count in result["collectives"].items() if count} == {4, 8, 12}
        assert result["logged"] == first["logged"], "one model on all ranks"
        assert result["logged"] == pytest.approx(result["expected"], rel=1e-5)
        assert result["stands"] == (5, True)
        for name, value in result["average"].items():
            torch.testing.assert_close(result["best"][name].float(), value, rtol=1e-6, atol=1e-7)
            assert torch.equal(result["best"][name], first["best"][name])
    for step, held in first["alone"].items():
        assert torch.equal(held, second["alone"][step]) == (step in (4, 8, 12))
    files = ["global_step5/model.safetensors", *(["model.safetensors"] if stage < 3 else [])]
    for file in files:
        saved = load_file(tmp_path / "saved" / "checkpoint-5" / file)
        for name, value in first["average"].items():
            torch.testing.assert_close(saved[name], value, rtol=1e-6, atol=1e-7)
    assert any("average_tokens_across_devices is True" in line for line in first["said"])
    assert any("stands after step 5, inside a round of 4 steps" in line for line in first["said"])


def accumulation_job(folder: str) -> dict[str, Any]:
    """3 epochs of 5 micro-batches: 9 steps, the last of an epoch with one, and the end inside a round."""
    said = messages_of_this_job()
    with accelerate_without_gpu():
        options: dict[str, Any] = {"data": 40, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
        saved = train(make_trainer(folder, 1, CONSTANT, save_strategy="steps", save_steps=5, **options))
        resumed = train(make_trainer(folder, 1, CONSTANT, **options), resume_from_checkpoint=f"{folder}/checkpoint-5")
        refused = []
        for qsr, steps in ((training.QSR, 12), (CONSTANT, 13)):
            try:
                train(make_trainer(folder, 1, qsr, max_steps=steps))
            except ValueError as error:
                refused.append(str(error))
    return {
        "saved": saved.held,
        "resumed": resumed.held,
        "end": own_parameters(saved.deepspeed),
        "said": said,
        "refused": refused,
    }


def test_trainer_accumulates_and_ends_inside_a_round(processes: Processes, tmp_path: Path) -> None:
    first, second = processes.run(accumulation_job, folder=str(tmp_path))
    for result in (first, second):
        assert list(result["saved"]) == list(range(1, 10))
        assert list(result["resumed"]) == list(range(6, 10))
        for step, held in result["resumed"].items():
            assert torch.equal(held, result["saved"][step])
        for name, value in result["end"].items():
            assert torch.equal(value, first["end"][name])
        assert "Trainer sets the learning rate" in result["refused"][0]
        assert "write qsr.total_steps 13" in result["refused"][1]
    assert not torch.equal(first["saved"][9], second["saved"][9])
    assert any("stands after step 9, inside a round of 4 steps" in line for line in first["said"])
