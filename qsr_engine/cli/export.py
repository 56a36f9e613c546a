"""`qsr export`: a checkpoint's averaged model as safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from qsr_engine.cli.arguments import add_command
from qsr_engine.cli.errors import CommandError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = add_command(
        commands,
        "export",
        "Write a checkpoint's averaged model as safetensors.",
        more="A checkpoint inside a round has the workers' average too.",
        examples=["qsr export runs/vit vit.safetensors   # of the newest whole checkpoint"],
    )
    command.add_argument(
        "checkpoint", help="a checkpoint's folder; or that of a run, or of checkpoints: the newest whole one"
    )
    command.add_argument("out", help="file to write; of pictures timm.create_model(NAME, checkpoint_path=OUT) loads it")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the file, and say of which step it is."""
    from qsr_engine.checkpoint.manifest import CheckpointError
    from qsr_engine.checkpoint.model_file import export
    from qsr_engine.records.run_folder import CHECKPOINTS, MODEL, RECIPE

    if not Path(args.checkpoint).exists():
        raise CommandError(f"{args.checkpoint} is not there; name the folder of a checkpoint or of a run")
    of_run = Path(args.checkpoint, CHECKPOINTS)
    folder = of_run if of_run.is_dir() or Path(args.checkpoint, RECIPE).exists() else args.checkpoint
    try:
        manifest = export(folder, args.out)
    except CheckpointError as error:
        model = Path(args.checkpoint, MODEL)
        raise CommandError(f"{error}; {model} is the run's model" if model.exists() else error) from error
    print(f"{args.out}: the averaged model after step {manifest.step}")
    return 0
