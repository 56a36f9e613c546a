"""`qsr train`: starts the ranks where no launcher has, and trains in a rank.

It starts torchrun for the engine `fsdp` and for restarts, else DeepSpeed's launcher. A launcher has started this
process where RANK is set.
"""

from __future__ import annotations

import argparse
import os
import sys

from qsr_engine.cli.arguments import add_overrides, overrides, whole_number
from qsr_engine.cli.errors import CommandError
from qsr_engine.cli.launched import hopeless, no_restart, restarted, started_by_a_launcher, stopped_already
from qsr_engine.cli.launcher import launch
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import load_recipe, resolve_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import DataError, Index, check_shards, read_index
from qsr_engine.data.retrying import Retry
from qsr_engine.membership.hosts import HostError
from qsr_engine.membership.signals import STOPPED
from qsr_engine.records.run_folder import CHECKPOINTS, SUMMARY, check_run_folder, check_unfinished


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = commands.add_parser("train", help="train a recipe")
    command.add_argument("recipe", help="YAML file")
    add_overrides(command)
    command.add_argument("--engine", choices=["deepspeed", "fsdp"], help="instead of the recipe's (default: deepspeed)")
    command.add_argument(
        "--resume", action="store_true", help="go on from the run's newest checkpoint; begin if there is none"
    )
    command.add_argument("--ranks", type=whole_number, help="processes on this host (default: one a GPU)")
    command.add_argument(
        "--restarts",
        type=_count,
        default=0,
        metavar="N",
        help="times that the run goes on from its newest checkpoint by itself when a rank has died (with torchrun)",
    )
    command.set_defaults(run=run)


def _count(text: str) -> int:
    return 0 if text == "0" else whole_number(text)


def run(args: argparse.Namespace) -> int:
    """Train in this rank, or start a launcher of ranks."""
    recipe, index = _prepare(args)
    if started_by_a_launcher():
        if restarted() and (recipe.run_dir / SUMMARY).exists():  # a rank died when everything was done
            return 0
        return _train_rank(recipe, index, resume=args.resume or restarted())
    if args.restarts and recipe.logging.checkpoint_every is None:
        raise ConfigError(
            f"--restarts is {args.restarts}, and logging.checkpoint_every is not given, so that a restarted run would "
            "begin anew; write it, in steps"
        )
    check = check_unfinished if args.resume else check_run_folder
    check(recipe.run_dir)
    if args.resume and args.ranks is not None:
        from qsr_engine.training.resuming import batch_for

        batch_for(recipe, args.ranks, resume=True)
    words = ["train", args.recipe, *overrides(args), *(["--resume"] if args.resume else [])]
    code = launch(recipe, args.ranks, words, resume=args.resume, restarts=args.restarts)
    if code == 0 and not (recipe.run_dir / SUMMARY).exists():  # the launcher hides some deaths of its children
        raise ConfigError(f"{recipe.run_dir}: the launcher ended without an error, and the run is not finished")
    if args.restarts and 0 < code < 128 and code != STOPPED:  # from 128 on: ended by a signal
        _say_what_is_left(recipe, args.restarts)
    return code


def _say_what_is_left(recipe: Recipe, restarts: int) -> None:
    from qsr_engine.checkpoint.find import find_alone
    from qsr_engine.checkpoint.manifest import CheckpointError

    try:
        left = f"its last checkpoint is {find_alone(recipe.run_dir / CHECKPOINTS)[0]}; mend it, then add --resume"
    except CheckpointError:
        left = "it has no whole checkpoint"
    print(f"qsr: error: the run failed with --restarts {restarts}, and {left}", file=sys.stderr, flush=True)


def _prepare(args: argparse.Namespace) -> tuple[Recipe, Index]:
    """Everything that can be checked before a process group starts."""
    if args.engine is not None:
        args.set.append(f"engine={args.engine}")
    recipe = load_recipe(args.recipe, args.set)
    index = read_index(recipe.data.shards, Retry(recipe.data.retries, recipe.data.retry_seconds))
    for split in (recipe.data.train, recipe.data.eval):
        index.split(split)
        try:
            check_shards(recipe.data.shards, index, split)
        except DataError as error:
            if not recipe.data.max_bad_samples:
                raise
            print(f"qsr: warning: {error}; its samples count as bad", file=sys.stderr, flush=True)
    return resolve_recipe(recipe, index.split(recipe.data.train).samples), index


def _train_rank(recipe: Recipe, index: Index, *, resume: bool) -> int:
    from torch.distributed import DistError

    from qsr_engine.averaging import CollectiveError
    from qsr_engine.checkpoint.manifest import CheckpointError
    from qsr_engine.local_steps.header import BoundaryError
    from qsr_engine.membership.facts import AgreementError
    from qsr_engine.membership.signals import StoppedError, exit_code
    from qsr_engine.training.loop import DivergenceError, train
    from qsr_engine.training.saving import UnsavedError

    rank = int(os.environ["RANK"])
    if stopped_already():
        if rank == 0:
            print(f"qsr: {recipe.run_dir}: the run was asked to stop, and is not started again", file=sys.stderr)
        return exit_code(rank)
    earlier = hopeless()
    if earlier is not None:
        raise CommandError(f"not started again, since the same would happen: {earlier}")
    try:
        train(recipe, index, resume=resume)
    except StoppedError as stopped:
        if rank == 0:
            print(f"qsr: {stopped}", file=sys.stderr, flush=True)
        return exit_code(rank)
    except (AgreementError, BoundaryError, ConfigError, DataError, DivergenceError, UnsavedError) as error:
        no_restart(error)
        raise CommandError(error) from error
    except (CheckpointError, CollectiveError, HostError) as error:
        raise CommandError(error) from error
    except OSError as error:
        raise CommandError(f"{error.strerror or error}: {error.filename or recipe.run_dir}") from error
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        raise CommandError(f"the connection to another rank failed; if it has ended, it says why ({error})") from error
    return 0
