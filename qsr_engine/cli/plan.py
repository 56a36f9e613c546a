"""`qsr plan`: a run's schedule before it starts, and its hours where costs are given, measured or fitted."""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

from qsr_engine.cli.arguments import add_overrides, overrides, whole_number
from qsr_engine.cli.errors import CommandError
from qsr_engine.cli.launched import started_by_a_launcher
from qsr_engine.cli.launcher import launch
from qsr_engine.config.strict import ConfigError
from qsr_engine.config.units import parse_count, parse_rate, parse_seconds
from qsr_engine.planning.forecast import LIMIT_PERCENT, bytes_of, check_place, check_plot, make_forecast, print_plan
from qsr_engine.planning.plan import Plan, make_plan, write_header
from qsr_engine.planning.settings import CostSettings, cost_settings, read_costs, save_costs


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = commands.add_parser("plan", help="what a run's schedule will be: rounds, periods, communication")
    command.add_argument("recipe", help='YAML file, or a DeepSpeed configuration (.json) with a "qsr" block')
    command.add_argument("--json", action="store_true", help="the same figures as JSON")
    add_overrides(command)
    command.add_argument(
        "--samples", type=whole_number, metavar="N", help="training samples, where neither recipe nor shards say it"
    )
    command.add_argument(
        "--write-header", action="store_true", help="write the share of communication into the recipe's first comment"
    )
    _add_costs(command.add_argument_group("hours", "from these, --costs, --measure or --fit"))
    command.set_defaults(run=run)


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


def run(args: argparse.Namespace) -> int:
    """Print the plan, with hours where costs are known."""
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
            raise CommandError(error) from error
        return _print_forecast(args, made, given, measured) if os.environ["RANK"] == "0" else 0
    words = ["plan", args.recipe, *overrides(args)]
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
