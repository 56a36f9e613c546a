"""The `qsr` command, which is `python -m qsr_engine` too.

`qsr train` starts DeepSpeed's launcher, or torchrun for the engine `fsdp`, when no launcher started it; started by one
(RANK is set), it trains. Errors that are the user's to mend end the command with one message and no traceback.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from types import FrameType
from typing import Any

from qsr_engine.cli.launcher import hopeless, launch, no_restart, restarted, started_by_a_launcher, stopped_already
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import load_recipe, resolve_recipe
from qsr_engine.config.strict import ConfigError
from qsr_engine.config.units import parse_count, parse_rate, parse_seconds
from qsr_engine.data import (
    DataError,
    Index,
    check_shards,
    index_shards,
    read_index,
    verify_shards,
    write_cifar10,
    write_digits,
    write_imagefolder,
)
from qsr_engine.data.retrying import Retry
from qsr_engine.data.writing.data_sets import CIFAR10_ROOT, QUALITY, SHARD_BYTES
from qsr_engine.data.writing.processes import usable_cores
from qsr_engine.membership.hosts import HostError, check_hosts
from qsr_engine.membership.signals import STOPPED
from qsr_engine.planning.calibration import CostSettings, cost_settings, read_costs, save_costs
from qsr_engine.planning.forecast import LIMIT_PERCENT, bytes_of, check_place, check_plot, make_forecast, print_plan
from qsr_engine.planning.plan import Plan, make_plan, write_header
from qsr_engine.records.report import report
from qsr_engine.records.run_folder import CHECKPOINTS, SUMMARY, check_run_folder, check_unfinished
from qsr_engine.records.runs import ReportError

MB = 1_000_000
USER_ERROR = 2  # exit code, as argparse's own


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (ConfigError, DataError, HostError, ReportError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return 130


def _fail(error: Exception) -> int:
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(f"qsr: error{rank}: {error}", file=sys.stderr, flush=True)
    return USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsr", description="Local-step training with the Quadratic Synchronization Rule"
    )
    # DeepSpeed's launcher puts it before the command; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe")
    train.add_argument("recipe", help="YAML file")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a key; repeatable"
    )
    train.add_argument("--engine", choices=["deepspeed", "fsdp"], help="instead of the recipe's (default: deepspeed)")
    train.add_argument(
        "--resume", action="store_true", help="go on from the run's newest checkpoint; begin if there is none"
    )
    train.add_argument("--ranks", type=whole_number, help="processes on this host (default: one a GPU)")
    train.add_argument(
        "--restarts",
        type=count,
        default=0,
        metavar="N",
        help="times that the run goes on from its newest checkpoint by itself when a rank has died (with torchrun)",
    )
    train.set_defaults(run=_train)

    _add_plan(commands.add_parser("plan", help="what a run's schedule will be: rounds, periods, communication"))

    command = commands.add_parser("export", help="write a checkpoint's averaged model as safetensors")
    command.add_argument("checkpoint", help="a checkpoint's folder, or a folder of checkpoints: the newest whole one")
    command.add_argument("out", help="file to write; timm.create_model(NAME, checkpoint_path=OUT) loads it")
    command.set_defaults(run=_export)

    command = commands.add_parser("report", help="compare finished runs: a table and plots")
    command.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs")
    command.add_argument("--out", help="folder of the plots (default: `report` beside the first run)")
    command.set_defaults(run=lambda args: print(report(args.runs, args.out)) or 0)

    command = commands.add_parser("hosts", help="ask all hosts of a hostfile: do they answer, with the same versions?")
    command.add_argument("hostfile", help="DeepSpeed's: a line a host, `NAME slots=GPUS`")
    command.add_argument("--ssh-port", type=whole_number, metavar="N", help="where ssh's configuration does not say it")
    command.set_defaults(run=_hosts)

    _add_shards(commands.add_parser("shards", help="make and check WebDataset shards"))
    return parser


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help='YAML file, or a DeepSpeed configuration (.json) with a "qsr" block')
    command.add_argument("--json", action="store_true", help="the same figures as JSON")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a key; repeatable"
    )
    command.add_argument(
        "--samples", type=whole_number, metavar="N", help="training samples, where neither recipe nor shards say it"
    )
    command.add_argument(
        "--write-header", action="store_true", help="write the share of communication into the recipe's first comment"
    )
    _add_costs(command.add_argument_group("hours", "from these, --costs, --measure or --fit"))
    command.set_defaults(run=_plan)


def _add_costs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--step-seconds", metavar="TIME", help="compute of one optimizer step: 0.41s, 410ms")
    group.add_argument("--bandwidth", metavar="RATE", help="of a host's port: 25gbit, 100mbit, 3.1GB/s, unlimited")
    group.add_argument("--latency", metavar="TIME", help="one way, between hosts: 50us (default: 0)")
    group.add_argument("--workers", type=whole_number, metavar="N", help="that average with one another")
    group.add_argument("--workers-per-host", type=whole_number, metavar="N", help="share a port (default: 1)")
    group.add_argument("--local-bandwidth", metavar="RATE", help="of a worker inside its host (default: unlimited)")
    group.add_argument("--tree", action="store_true", help="all-reduce by two trees instead of a ring")
    group.add_argument("--two-level", action="store_true", help="reduce inside each host first")
    group.add_argument("--efficiency", metavar="SHARE", type=float, help="of the bandwidths, reached (default: 1)")
    group.add_argument("--step-cv", type=float, metavar="CV", help="of step times, std / mean (default: 0)")
    group.add_argument("--worker-cv", type=float, metavar="CV", help="of the workers' mean step times (default: 0)")
    group.add_argument(
        "--overlap", choices=["none", "next_forward", "delayed"], help="of averagings, instead of the recipe's"
    )
    group.add_argument(
        "--parallel-overlap",
        type=float,
        metavar="SHARE",
        help="of a step, behind which gradients of parallel travel (default: 0 for DeepSpeed below stage 3, else 2/3)",
    )
    group.add_argument("--parameters", metavar="N", help="of the model: 86.6e6 (default: the recipe's model is made)")
    group.add_argument(
        "--costs", metavar="FILE", help="JSON of such figures, as --save writes it; options go before it"
    )
    group.add_argument("--measure", action="store_true", help="from a short run of the recipe's model on these ranks")
    group.add_argument("--ranks", type=whole_number, help="with --measure: processes on this host (default: one a GPU)")
    group.add_argument("--save", metavar="FILE", help="write the figures for --costs")
    group.add_argument("--measure-only", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--fit", nargs=2, metavar="RUN", help="from two finished runs of other periods")
    group.add_argument(
        "--limit",
        type=float,
        default=LIMIT_PERCENT,
        metavar="PERCENT",
        help="of the time, under which h_base is to keep communication (default: %(default)g)",
    )
    group.add_argument("--plot", metavar="FILE", help="draw hours over bandwidth for each strategy (.png, .svg, .pdf)")


def _add_shards(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_shards)
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    _add_imagefolder(
        kinds.add_parser(
            "imagefolder",
            help="from ImageNet's folders, ROOT/train/CLASS/*.jpg and ROOT/val/..., or ROOT/ILSVRC2012_img_*.tar",
            description="Run the same command again after it was stopped: finished shards are kept.",
        )
    )
    command = kinds.add_parser("cifar10", help="torchvision's CIFAR-10; its test images become the split val")
    command.add_argument("out")
    command.add_argument(
        "--root", help=f"folder with cifar-10-batches-py, downloaded to it where missing (default: {CIFAR10_ROOT})"
    )
    command.set_defaults(shards=lambda args: _say(args.out, write_cifar10(args.out, root=args.root)))
    command = kinds.add_parser("digits", help="scikit-learn's 1,797 handwritten digits")
    command.add_argument("out")
    command.set_defaults(shards=lambda args: _say(args.out, write_digits(args.out)))
    command = kinds.add_parser("index", help="write the index.json of a folder of shards made elsewhere")
    command.add_argument("folder")
    command.set_defaults(shards=lambda args: _say(args.folder, index_shards(args.folder)))
    command = kinds.add_parser("verify", help="read every shard, compare it with index.json and check every sample")
    command.add_argument("folder")
    command.add_argument("--decode", action="store_true", help="decode every image too")
    _add_processes(command)
    command.set_defaults(shards=_verify)


def _add_imagefolder(command: argparse.ArgumentParser) -> None:
    command.add_argument("root")
    command.add_argument("out")
    size = command.add_mutually_exclusive_group()
    size.add_argument(
        "--shard-mb",
        type=whole_number,
        default=SHARD_BYTES // MB,
        metavar="N",
        help="at most N million bytes a shard, counted before images are made smaller (default: %(default)s)",
    )
    size.add_argument("--samples-per-shard", type=whole_number, metavar="N", help="N images a shard instead")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle (default: 0)")
    command.add_argument("--split", help="name of the split where ROOT holds classes and no splits (default: train)")
    side = command.add_mutually_exclusive_group()
    side.add_argument(
        "--max-side", type=whole_number, metavar="N", help="resize images whose long side has more than N pixels"
    )
    side.add_argument(
        "--short-side", type=whole_number, metavar="N", help="resize images whose short side has more than N pixels"
    )
    command.add_argument(
        "--quality", type=whole_number, metavar="N", help=f"of the JPEG of resized images (default: {QUALITY})"
    )
    _add_processes(command)
    command.set_defaults(shards=_write_imagefolder)


def _add_processes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--processes",
        type=whole_number,
        default=usable_cores(),
        metavar="N",
        help="how many work at once (default: the cores that this process may use, %(default)s)",
    )


def whole_number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def count(text: str) -> int:
    return 0 if text == "0" else whole_number(text)


def _shards(args: argparse.Namespace) -> int:
    """Run a sub-command. SIGTERM ends it as Ctrl-C does: other processes are stopped and temporary files deleted.

    Most files that cannot be read or written are a DataError, which says what to do; what is left is said here.
    """

    def stop(signum: int, _: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return int(args.shards(args))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(RuntimeError(f"{where}{error.strerror or error}"))
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_imagefolder(args: argparse.Namespace) -> int:
    options = {
        name: getattr(args, name)
        for name in ("samples_per_shard", "seed", "split", "max_side", "short_side", "quality", "processes")
    }
    return _say(args.out, write_imagefolder(args.root, args.out, shard_bytes=args.shard_mb * MB, **options))


def _verify(args: argparse.Namespace) -> int:
    return _say(args.folder, verify_shards(args.folder, decode=args.decode, processes=args.processes))


def _say(folder: str, index: Index) -> int:
    folder = os.fsencode(folder).decode(errors="backslashreplace")  # a name need not be UTF-8
    for name, split in index.splits.items():
        print(f"{folder}: split {name!r}, {split.samples} samples in {len(split.shards)} shards")
    return 0


def _train(args: argparse.Namespace) -> int:
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
    words = ["train", args.recipe, *_overrides(args), *(["--resume"] if args.resume else [])]
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


def _overrides(args: argparse.Namespace) -> list[str]:
    return [word for override in args.set for word in ("--set", override)]


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


def _plan(args: argparse.Namespace) -> int:
    if args.write_header:
        others = (args.samples, args.costs, args.fit, args.plot, args.save, args.ranks)
        said = args.json or args.set or args.measure or any(other is not None for other in others)
        if said or args.limit != LIMIT_PERCENT or _given_costs(args):
            raise ConfigError("--write-header says what the recipe itself says; leave the other options out")
        print(write_header(args.recipe))
        return 0
    if not 0 < args.limit < 100:
        raise ConfigError(f"--limit {args.limit:g}: write a share of the time in per cent, such as 10")
    if os.environ.get("RANK", "0") == "0":  # which alone writes
        if args.plot is not None:
            check_plot(args.plot)
        if args.save is not None:
            check_place("--save", args.save)
    given, made = _given_costs(args), make_plan(args.recipe, samples=args.samples, overrides=args.set)
    if args.measure:
        return _plan_measured(args, made, given)
    if args.ranks is not None:
        raise ConfigError(f"--ranks {args.ranks} is for --measure; the cost model counts --workers")
    return _print_forecast(args, made, given)


def _print_forecast(
    args: argparse.Namespace, made: Plan, given: dict[str, Any], measured: CostSettings | None = None
) -> int:
    """Save, then print, then plot, so that what was measured is not lost where a later one fails."""
    base = measured if args.costs is None else read_costs(args.costs)
    costs = base is not None or args.fit is not None or not set(given) <= {"parameters", "workers"}
    if not costs and (args.plot is not None or args.save is not None):
        option = "--save" if args.plot is None else "--plot"
        raise ConfigError(f"{option} needs costs: --step-seconds, --bandwidth and --workers")
    if args.save is not None:
        if args.fit is not None:
            raise ConfigError("--save writes figures for --costs, and --fit finds none of bandwidth; leave it out")
        _save(args.save, given, base, measured)
    if args.measure_only:
        return 0
    forecast = known = None
    if costs:
        forecast = make_forecast(made, given, costs=base, fit=args.fit, limit=args.limit / 100)
    elif given:
        known = bytes_of(made, given.get("parameters"), given.get("workers"))
    print(print_plan(made, forecast, known, as_json=args.json), flush=True)
    if args.plot is not None and forecast is not None:
        forecast.plot(args.plot)
    return 0


def _save(path: str, given: dict[str, Any], base: CostSettings | None, measured: CostSettings | None) -> None:
    """Save the costs with the options; where these do not go together, what was measured alone, and say so."""
    try:
        settings = cost_settings(given, base)
    except ConfigError as error:
        if measured is None:
            raise
        save_costs(measured, path)
        raise ConfigError(f"{error}. What was measured is in {path}: go on with --costs {path}") from error
    save_costs(settings, path)


def _given_costs(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the cost model, by the names of CostSettings."""
    given: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("workers", "workers_per_host", "efficiency", "step_cv", "worker_cv")
        if getattr(args, name) is not None
    }
    for name, parse in (
        ("step_seconds", parse_seconds),
        ("latency", parse_seconds),
        ("bandwidth", parse_rate),
        ("local_bandwidth", parse_rate),
        ("parameters", parse_count),
    ):
        if (text := getattr(args, name)) is not None:
            given[name] = parse(text, f"--{name.replace('_', '-')}")
    if args.efficiency is not None and not 0 < args.efficiency <= 1:
        raise ConfigError(f"--efficiency {args.efficiency:g}: write a share above 0 and up to 1, such as 0.8 for 80 %")
    if args.parallel_overlap is not None and not 0 <= args.parallel_overlap <= 1:
        raise ConfigError(f"--parallel-overlap {args.parallel_overlap:g}: write a share of a step from 0 to 1")
    given |= {"algorithm": "tree"} if args.tree else {}
    given |= {"two_level": True} if args.two_level else {}
    given |= {} if args.overlap is None else {"overlap": args.overlap}
    return given | ({} if args.parallel_overlap is None else {"backward_share": args.parallel_overlap})


def _plan_measured(args: argparse.Namespace, made: Plan, given: dict[str, Any]) -> int:
    """Measure on the ranks of the launcher that started this, or start one; then print the plan once."""
    if args.fit is not None or args.costs is not None:
        raise ConfigError("--measure finds the costs itself; leave --fit and --costs out")
    if made.recipe is None:
        raise ConfigError(f"{args.recipe}: --measure needs a recipe, which says the model and the batch")
    if started_by_a_launcher():
        from qsr_engine.local_steps.header import BoundaryError
        from qsr_engine.membership.facts import AgreementError
        from qsr_engine.planning.measure import measure

        try:
            measured = measure(made.recipe)
        except (AgreementError, BoundaryError) as error:
            return _fail(error)
        return _print_forecast(args, made, given, measured) if os.environ["RANK"] == "0" else 0
    words = ["plan", args.recipe, *_overrides(args)]
    words += [] if args.samples is None else ["--samples", str(args.samples)]
    with tempfile.TemporaryDirectory() as folder:
        saved = os.path.join(folder, "costs.json")
        code = launch(made.recipe, args.ranks, [*words, "--measure", "--measure-only", "--save", saved])
        if code != 0:
            return code
        if not os.path.exists(saved):
            raise ConfigError("--measure: the launcher ended without an error, and nothing was measured")
        measured = read_costs(saved)
    return _print_forecast(args, made, given, measured)


def _hosts(args: argparse.Namespace) -> int:
    print(check_hosts(args.hostfile, ["-p", str(args.ssh_port)] if args.ssh_port else []))
    return 0


def _export(args: argparse.Namespace) -> int:
    from qsr_engine.checkpoint.manifest import CheckpointError
    from qsr_engine.checkpoint.model_file import export

    try:
        manifest = export(args.checkpoint, args.out)
    except CheckpointError as error:
        return _fail(error)
    print(f"{args.out}: the averaged model after step {manifest.step}")
    return 0


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
        return _fail(RuntimeError(f"not started again, since the same would happen: {earlier}"))
    try:
        train(recipe, index, resume=resume)
    except StoppedError as stopped:
        if rank == 0:
            print(f"qsr: {stopped}", file=sys.stderr, flush=True)
        return exit_code(rank)
    except (AgreementError, BoundaryError, ConfigError, DataError, DivergenceError, UnsavedError) as error:
        no_restart(error)
        return _fail(error)
    except (CheckpointError, CollectiveError, HostError) as error:
        return _fail(error)
    except OSError as error:
        return _fail(RuntimeError(f"{error.strerror or error}: {error.filename or recipe.run_dir}"))
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        return _fail(RuntimeError(f"the connection to another rank failed; if it has ended, it says why ({error})"))
    return 0
