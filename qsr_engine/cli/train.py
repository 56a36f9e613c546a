"""`qsr train`: starts the ranks where no launcher has, and trains in a rank.

It starts torchrun for the engine `fsdp` and for restarts, else DeepSpeed's launcher. A launcher has started this
process where RANK is set.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from qsr_engine.cli.arguments import add_command, add_overrides, overrides, whole_number
from qsr_engine.cli.dry_run import dry_run
from qsr_engine.cli.errors import CommandError, UsageError
from qsr_engine.cli.launched import hopeless, no_restart, restarted, started_by_a_launcher, stopped_already
from qsr_engine.cli.launcher import launch
from qsr_engine.config.batch import check_world_size
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import load_recipe, resolve_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.data import DataError, Index, check_shards, read_index
from qsr_engine.data.retrying import Retry
from qsr_engine.membership.hosts import HostError
from qsr_engine.membership.signals import STOPPED
from qsr_engine.records.run_folder import CHECKPOINTS, ORIGIN, check_run_folder, check_unfinished, is_finished
from qsr_engine.records.services import check_services

if TYPE_CHECKING:
    from qsr_engine.training.branching import Origin


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = add_command(
        commands,
        "train",
        "Train a recipe on this host's GPUs, or in the ranks that a launcher has started.",
        more="SIGTERM and SIGUSR1 make it save and end with exit code 75; Ctrl-C ends it at once. Exit code 1 is an "
        "error, and 2 a command that cannot be read.",
        examples=[
            "qsr train my.yaml                        # a rank a GPU",
            "qsr train my.yaml --dry-run              # check all that can be checked, and train nothing",
            "qsr train my.yaml --ranks 2 --set epochs=1 --set logging.name=short",
            "qsr train my.yaml --resume               # go on from the newest checkpoint",
            "DS_ACCELERATOR=cpu qsr train my.yaml --ranks 2   # without a GPU",
            "qsr train my.yaml --elastic --ranks 3 --restarts 5   # workers that may die and join",
        ],
    )
    command.add_argument("recipe", help="YAML file")
    add_overrides(command)
    command.add_argument("--engine", choices=["deepspeed", "fsdp"], help="instead of the recipe's (default: deepspeed)")
    command.add_argument(
        "--resume", action="store_true", help="go on from the run's newest checkpoint; begin if there is none"
    )
    command.add_argument(
        "--from",
        dest="origin",
        metavar="RUN",
        help=f"begin at the newest checkpoint of another run, or at RUN/{CHECKPOINTS}/TAG, with this recipe",
    )
    command.add_argument(
        "--optimizer-states",
        choices=["own", "mean", "fresh"],
        default="own",
        help="with --from: every worker has its own (default), all have the mean of the workers', or begin anew",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="check recipe, shards, model and batch, show the plan, and end"
    )
    command.add_argument("--ranks", type=whole_number, help="processes on this host (default: one a GPU)")
    command.add_argument(
        "--restarts",
        type=_count,
        default=0,
        metavar="N",
        help="times that the run goes on from its newest checkpoint by itself when a rank has died (with torchrun); "
        "with --elastic: that a worker which has died is started again, while the others train on",
    )
    command.add_argument(
        "--elastic",
        action="store_true",
        help="every worker is a job of its own, and may die or join (qsr.membership: torchft); the ones of other hosts "
        "meet at the lighthouse that TORCHFT_LIGHTHOUSE names",
    )
    command.set_defaults(run=run)


def _count(text: str) -> int:
    return 0 if text == "0" else whole_number(text)


def run(args: argparse.Namespace) -> int:
    """Train in this rank, or start a launcher of ranks."""
    if args.origin is not None and args.resume:
        raise UsageError("--from begins a run, and --resume goes on with one, wherever it began; leave one of them out")
    if args.origin is None and args.optimizer_states != "own":
        raise UsageError(f"--optimizer-states {args.optimizer_states} is for --from, which is not given; leave it out")
    if started_by_a_launcher():
        if args.dry_run:
            raise UsageError("--dry-run starts no ranks, and a launcher has started this one; call `qsr` itself")
        from qsr_engine.membership.roll_call import told_to_all

        with told_to_all():
            recipe, index = _prepare(args)
            origin = None if restarted() and (recipe.run_dir / ORIGIN).exists() else _find_origin(args, recipe)
        if restarted() and is_finished(recipe.run_dir, recipe.last_step):  # a rank died when everything was done
            return 0
        return _train_rank(recipe, index, origin, resume=args.resume or restarted())
    recipe, index = _prepare(args)
    origin = _find_origin(args, recipe)
    if recipe.qsr.membership.elastic:
        return _train_workers(args, recipe, index)
    if args.restarts and recipe.logging.checkpoint_every is None:
        raise ConfigError(
            f"--restarts is {args.restarts}, and logging.checkpoint_every is not given, so that a restarted run would "
            "begin anew; write it, in steps"
        )
    if args.resume:
        check_unfinished(recipe.run_dir, recipe.last_step)
    else:
        check_run_folder(recipe.run_dir)
    if args.dry_run:
        dry_run(args.recipe, recipe, index, args.ranks, resume=args.resume)
        return 0
    if args.resume and args.ranks is not None:
        from qsr_engine.training.resuming import batch_for

        batch_for(recipe, args.ranks, resume=True)
    words = ["train", args.recipe, *overrides(args), *(["--resume"] if args.resume else [])]
    if origin is not None:
        words += ["--from", str(origin.folder), "--optimizer-states", origin.optimizers]
    code = launch(recipe, args.ranks, words, resume=args.resume, restarts=args.restarts)
    # The launcher hides some deaths of its children.
    if code == 0 and not is_finished(recipe.run_dir, recipe.last_step):
        raise ConfigError(f"{recipe.run_dir}: the launcher ended without an error, and the run is not finished")
    if args.restarts and 0 < code < 128 and code != STOPPED:  # from 128 on: ended by a signal
        _say_what_is_left(recipe, args.restarts)
    return code


def _train_workers(args: argparse.Namespace, recipe: Recipe, index: Index) -> int:
    """The workers of this host, each a job of its own."""
    from qsr_engine.cli.elastic import launch_workers
    from qsr_engine.membership.quorum import LIGHTHOUSE
    from qsr_engine.training.attendance import batch_of_worker

    if args.origin is not None:
        raise UsageError(
            "--from is given, and the run is elastic; begin it without --from, or write membership 'fixed'"
        )
    if args.ranks is None:
        raise ConfigError("--elastic needs the number of ranks on this host; write --ranks N")
    alone = not os.environ.get(LIGHTHOUSE)  # else workers on other hosts may have begun the run
    workers = check_world_size(args.ranks, recipe.qsr.worker_size)
    if alone and workers < recipe.qsr.membership.min_workers:
        raise ConfigError(
            f"membership.min_workers is {recipe.qsr.membership.min_workers}, and {workers} workers start here with a "
            f"lighthouse of their own, where no others come; write --ranks for so many, or name a lighthouse "
            f"({LIGHTHOUSE}, `qsr lighthouse`)"
        )
    batch_of_worker(recipe, recipe.qsr.worker_size, resume=args.resume, workers=workers if alone else 1)
    if args.resume:
        check_unfinished(recipe.run_dir, recipe.last_step)
    elif alone:
        check_run_folder(recipe.run_dir)
    if args.dry_run:
        dry_run(args.recipe, recipe, index, args.ranks, resume=args.resume)
        return 0
    words = ["train", args.recipe, *overrides(args), *(["--resume"] if args.resume else [])]
    code = launch_workers(recipe, args.ranks, words, restarts=args.restarts)
    if code == 0 and alone and not is_finished(recipe.run_dir, recipe.last_step):
        raise ConfigError(f"{recipe.run_dir}: the workers ended without an error, and the run is not finished")
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
    if args.elastic:
        args.set.append("qsr.membership.way=torchft")
    recipe = load_recipe(args.recipe, args.set)
    check_services(recipe.logging.services)
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


def _find_origin(args: argparse.Namespace, recipe: Recipe) -> Origin | None:
    if args.origin is None:
        return None
    from qsr_engine.training.branching import find_origin

    return find_origin(args.origin, recipe, args.optimizer_states)


def _train_rank(recipe: Recipe, index: Index, origin: Origin | None, *, resume: bool) -> int:
    from torch.distributed import DistError

    from qsr_engine.averaging import CollectiveError
    from qsr_engine.checkpoint.manifest import CheckpointError
    from qsr_engine.local_steps.header import BoundaryError
    from qsr_engine.membership.facts import AgreementError
    from qsr_engine.membership.roll_call import told_to_all
    from qsr_engine.membership.signals import StoppedError, exit_code
    from qsr_engine.training.as_member import train_as_member
    from qsr_engine.training.loop import DivergenceError, train
    from qsr_engine.training.saving import UnsavedError

    rank = int(os.environ["RANK"])
    alone = int(os.environ["WORLD_SIZE"]) == recipe.qsr.worker_size and not recipe.qsr.membership.elastic
    if rank == 0 and alone:
        print(
            "qsr: one worker trains, so that nothing is averaged; more ranks make more (`--ranks N`, or more GPUs)",
            file=sys.stderr,
            flush=True,
        )
    if stopped_already():
        if rank == 0:
            print(f"qsr: {recipe.run_dir}: the run was asked to stop, and is not started again", file=sys.stderr)
        return exit_code(rank)
    with told_to_all():
        earlier = hopeless()
        if earlier is not None:
            raise CommandError(f"not started again, since the same would happen: {earlier}")
    try:
        if recipe.qsr.membership.elastic:
            train_as_member(recipe, index, resume=resume)
        else:
            train(recipe, index, resume=resume, origin=origin)
    except StoppedError as stopped:
        if rank == 0:
            print(f"qsr: {stopped}", file=sys.stderr, flush=True)
        return exit_code(rank)
    except (AgreementError, BoundaryError, ConfigError, DataError, DivergenceError, UnsavedError) as error:
        no_restart(error)
        raise CommandError(error) from error
    except (CheckpointError, CollectiveError, HostError) as error:
        raise CommandError(error, consequence=isinstance(error, CollectiveError)) from error
    except OSError as error:
        raise CommandError(f"{error.strerror or error}: {error.filename or recipe.run_dir}") from error
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        failed = f"the connection to another rank failed; if it has ended, it says why ({error})"
        raise CommandError(failed, consequence=True) from error
    return 0
