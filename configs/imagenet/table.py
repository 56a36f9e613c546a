"""The paper's runs by name: the recipes of this folder, and what `--set` makes of them.

    python -m configs.imagenet.table      # in the repository's root

writes the tables of README.md beside this file, after a change of a recipe or of RUNS. Nothing is trained.
"""

from __future__ import annotations

from pathlib import Path

from qsr_engine.planning.plan import Plan, make_plan

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
START = "<!-- `python -m configs.imagenet.table` writes what follows. -->\n"
MODELS = {"vit-b": "ViT-B/16", "resnet152": "ResNet-152", "resnet50": "ResNet-50"}

_LINEAR = "qsr.lr.schedule=linear"
_ROUNDED = "qsr.lr.schedule=cosine_step"
_STEP = "qsr.lr.schedule=step qsr.lr.decay_epochs=[30,60,80]"
_LARGE = "batch.train_batch_size=16384 qsr.lr.peak=3.2 logging.eval_every=780 logging.checkpoint_every=780"

# Name, which begins with the model's -> recipe without .yaml, and keys to set.
RUNS = {
    "vit-b": ("vit-b", ""),
    "vit-b-constant-h4": ("vit-b-constant-h4", ""),
    "vit-b-constant-h8": ("vit-b-constant-h4", "qsr.h_base=8"),
    "vit-b-qsr-h4": ("vit-b-qsr-h4", ""),
    "vit-b-qsr-h8": ("vit-b-qsr-h4", "qsr.h_base=8"),
    "vit-b-power1-h4": ("vit-b-qsr-h4", "qsr.power=1 qsr.alpha=0.0489"),
    "vit-b-power3-h4": ("vit-b-qsr-h4", "qsr.power=3 qsr.alpha=0.0125"),
    "vit-b-post-local-h4": ("vit-b-constant-h4", "qsr.strategy=post_local qsr.switch_epoch=150"),
    "vit-b-swap-h4": ("vit-b-constant-h4", "qsr.strategy=swap qsr.switch_epoch=270"),
    "vit-b-linear": ("vit-b", _LINEAR),
    "vit-b-linear-constant-h4": ("vit-b-constant-h4", _LINEAR),
    "vit-b-linear-qsr-h4": ("vit-b-qsr-h4", _LINEAR),
    "vit-b-step": ("vit-b", _ROUNDED),
    "vit-b-step-constant-h4": ("vit-b-constant-h4", _ROUNDED),
    "vit-b-step-qsr-h4": ("vit-b-qsr-h4", _ROUNDED),
    "vit-b-b16384": ("vit-b-b16384", ""),
    "vit-b-b16384-constant-h4": ("vit-b-b16384-qsr-h4", "qsr.strategy=constant"),
    "vit-b-b16384-constant-h8": ("vit-b-b16384-qsr-h4", "qsr.strategy=constant qsr.h_base=8"),
    "vit-b-b16384-qsr-h4": ("vit-b-b16384-qsr-h4", ""),
    "vit-b-b16384-qsr-h8": ("vit-b-b16384-qsr-h4", "qsr.h_base=8"),
    "resnet152": ("resnet152", ""),
    "resnet152-constant-h2": ("resnet152-constant-h2", ""),
    "resnet152-constant-h4": ("resnet152-constant-h2", "qsr.h_base=4"),
    "resnet152-qsr-h2": ("resnet152-qsr-h2", ""),
    "resnet152-qsr-h4": ("resnet152-qsr-h2", "qsr.h_base=4 qsr.alpha=0.25"),
    "resnet152-power1-h2": ("resnet152-qsr-h2", "qsr.power=1 qsr.alpha=0.439"),
    "resnet152-power3-h2": ("resnet152-qsr-h2", "qsr.power=3 qsr.alpha=0.152"),
    "resnet152-post-local-h4": ("resnet152-constant-h2", "qsr.strategy=post_local qsr.h_base=4 qsr.switch_epoch=100"),
    "resnet152-swap-h4": ("resnet152-constant-h2", "qsr.strategy=swap qsr.h_base=4 qsr.switch_epoch=190"),
    "resnet152-linear": ("resnet152", _LINEAR),
    "resnet152-linear-constant-h2": ("resnet152-constant-h2", _LINEAR),
    "resnet152-linear-qsr-h2": ("resnet152-qsr-h2", _LINEAR),
    "resnet152-step": ("resnet152", f"epochs=90 {_STEP}"),
    "resnet152-step-constant-h2": ("resnet152-constant-h2", f"epochs=90 {_STEP}"),
    "resnet152-step-qsr-h2": ("resnet152-qsr-h2", f"epochs=90 {_STEP}"),
    "resnet152-b16384": ("resnet152", _LARGE),
    "resnet152-b16384-constant-h2": ("resnet152-constant-h2", _LARGE),
    "resnet152-b16384-constant-h4": ("resnet152-constant-h2", f"qsr.h_base=4 {_LARGE}"),
    "resnet152-b16384-qsr-h2": ("resnet152-qsr-h2", _LARGE),
    "resnet152-b16384-qsr-h4": ("resnet152-qsr-h2", f"qsr.h_base=4 qsr.alpha=0.25 {_LARGE}"),
    "resnet50": ("resnet50", ""),
    "resnet50-constant-h2": ("resnet50-qsr-h2", "qsr.strategy=constant"),
    "resnet50-constant-h4": ("resnet50-qsr-h2", "qsr.strategy=constant qsr.h_base=4"),
    "resnet50-qsr-h2": ("resnet50-qsr-h2", ""),
    "resnet50-qsr-h4": ("resnet50-qsr-h2", "qsr.h_base=4 qsr.alpha=0.25"),
    "resnet50-power1-h2": ("resnet50-qsr-h2", "qsr.power=1 qsr.alpha=0.439"),
    "resnet50-power3-h2": ("resnet50-qsr-h2", "qsr.power=3 qsr.alpha=0.152"),
    "resnet50-post-local-h4": ("resnet50-qsr-h2", "qsr.strategy=post_local qsr.h_base=4 qsr.switch_epoch=45"),
    "resnet50-swap-h4": ("resnet50-qsr-h2", "qsr.strategy=swap qsr.h_base=4 qsr.switch_epoch=85"),
    "resnet50-linear": ("resnet50", _LINEAR),
    "resnet50-linear-constant-h2": ("resnet50-qsr-h2", f"qsr.strategy=constant {_LINEAR}"),
    "resnet50-linear-qsr-h2": ("resnet50-qsr-h2", _LINEAR),
    "resnet50-step": ("resnet50", _STEP),
    "resnet50-step-constant-h2": ("resnet50-qsr-h2", f"qsr.strategy=constant {_STEP}"),
    "resnet50-step-qsr-h2": ("resnet50-qsr-h2", _STEP),
}


def plan(name: str) -> Plan:
    """The plan of a run in RUNS.

    Raises:
        ConfigError: its recipe cannot be read or run.
    """
    recipe, _ = RUNS[name]
    return make_plan(FOLDER / f"{recipe}.yaml", overrides=overrides(name))


def overrides(name: str) -> list[str]:
    """What `--set` gets; where it gets something, the run's own name too, so that its folder is its own."""
    keys = RUNS[name][1].split()
    return [*keys, f"logging.name={name}"] if keys else []


def readme() -> str:
    """What README.md should be: its text as it stands, and the tables."""
    text = README.read_text(encoding="utf-8").partition(START)[0]
    return text + START + "".join(f"\n### {title}\n\n{_table(model)}" for model, title in MODELS.items())


def _table(model: str) -> str:
    head = "| run | `qsr train configs/imagenet/...` | averagings % | rounds | longest round |\n" + "| --- " * 5 + "|\n"
    return head + "".join(_row(name) for name in RUNS if f"{name}-".startswith(f"{model}-"))


def _row(name: str) -> str:
    made = plan(name)
    command = " --set ".join([f"{RUNS[name][0]}.yaml", *overrides(name)])
    longest = f"{made.longest_round.length} from step {made.longest_round.start}"
    return f"| {name} | `{command}` | {made.averagings_percent:.1f} | {len(made.rounds)} | {longest} |\n"


if __name__ == "__main__":
    README.write_text(readme(), encoding="utf-8")
