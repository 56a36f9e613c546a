"""`qsr plan`: a run's schedule before it starts, and its bytes and hours where they are known."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from qsr_engine.cli.arguments import add_command, add_overrides, overrides, whole_number
from qsr_engine.cli.errors import CommandError, UsageError
from qsr_engine.cli.launched import started_by_a_launcher
from qsr_engine.cli.launcher import launch
from qsr_engine.config.strict import ConfigError
from qsr_engine.config.units import parse_count, parse_rate, parse_seconds
from qsr_engine.planning.choose import choices, choices_text
from qsr_engine.planning.forecast import check_plot, make_forecast
from qsr_engine.planning.plan import Plan, make_plan

_PARSED = {  # options with a unit, by their names in a forecast
    "step_seconds": parse_seconds,
    "averaging_seconds": parse_seconds,
    "gradient_seconds": parse_seconds,
    "bandwidth": parse_rate,
    "parameters": parse_count,
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command's arguments."""
    command = add_command(
        commands,
        "plan",
        "Show what a run's schedule will be: rounds, periods, communication, bytes and hours.",
        more="Nothing is trained, and no shards are needed where the number of samples is known.",
        examples=[
            "qsr plan my.yaml                       # rounds and periods",
            "qsr plan my.yaml --choose --workers 8  # a few alphas and h_bases beside each other",
            "qsr plan my.yaml --workers 16 --step-seconds 410ms --bandwidth 25gbit",
            "qsr plan ds_config.json                # of a DeepSpeed configuration",
        ],
    )
    command.add_argument("recipe", help='YAML file, or a DeepSpeed configuration (.json) with a "qsr" block')
    command.add_argument("--json", action="store_true", help="the same figures as JSON")
    add_overrides(command)
    command.add_argument(
        "--samples", type=whole_number, metavar="N", help="training samples, where neither recipe nor shards say it"
    )
    command.add_argument("--choose", action="store_true", help="compare a few alphas and h_bases around the recipe's")
    command.add_argument("--failures", metavar="TIME", help="with --choose: expected between two of the whole run: 72h")
    group = command.add_argument_group("bytes and hours", "from these, --measure or --fit")
    group.add_argument("--workers", type=whole_number, metavar="N", help="that average with one another")
    group.add_argument("--parameters", metavar="N", help="of the model: 86.6e6 (default: the recipe's model is made)")
    group.add_argument("--step-seconds", metavar="TIME", help="compute of one optimizer step: 0.41s, 410ms")
    group.add_argument("--bandwidth", metavar="RATE", help="of what leaves a worker: 25gbit, 3.1GB/s, unlimited")
    group.add_argument("--averaging-seconds", metavar="TIME", help="of one averaging, in place of bytes over bandwidth")
    group.add_argument("--gradient-seconds", metavar="TIME", help="that a step of parallel takes longer, likewise")
    group.add_argument("--measure", action="store_true", help="from short runs of the recipe's model on these ranks")
    group.add_argument("--ranks", type=whole_number, help="with --measure: processes on this host (default: one a GPU)")
    group.add_argument("--measured-to", metavar="FILE", help=argparse.SUPPRESS)  # for the command that launched it
    group.add_argument("--fit", nargs=2, metavar="RUN", help="from two finished runs of other periods")
    group.add_argument("--plot", metavar="FILE", help="draw hours over bandwidth for each strategy (.png, .svg, .pdf)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan, with bytes and hours where they are known."""
    failures = None if args.failures is None else parse_seconds(args.failures, "--failures")
    if failures is not None and not (args.choose and failures):
        raise UsageError(f"--failures {args.failures}: it is for --choose; write both, and a time above 0 such as 72h")
    if args.ranks is not None and not args.measure:
        raise UsageError(f"--ranks {args.ranks} is for --measure; bytes and hours count --workers")
    if args.measure and args.fit is not None:
        raise UsageError("--measure finds the costs itself; leave --fit out")
    if args.plot is not None:
        check_plot(args.plot)
    given, plan = _given(args), make_plan(args.recipe, samples=args.samples, overrides=args.set)
    measured = None
    if args.measure:
        measured = _measured(args, plan)
        if measured is None:
            return 0
    forecast = make_forecast(plan, given, measured=measured, fit=args.fit)
    rows = choices(forecast, failures) if args.choose else None
    if args.json:
        print(json.dumps({**forecast.as_dict(), **({} if rows is None else {"choices": rows})}, indent=2), flush=True)
    else:
        parts = [forecast.text(), *([] if rows is None else [choices_text(rows, failures)])]
        print("\n\n".join(parts), flush=True)
    if args.plot is not None:
        forecast.plot(args.plot)
    return 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of bytes and hours."""
    given: dict[str, Any] = {} if args.workers is None else {"workers": args.workers}
    for name, parse in _PARSED.items():
        if (text := getattr(args, name)) is not None:
            given[name] = parse(text, f"--{name.replace('_', '-')}")
    if given.get("step_seconds") == 0:
        raise ConfigError(f"--step-seconds {args.step_seconds}: a step takes time; write more than 0")
    return given


def _measured(args: argparse.Namespace, plan: Plan) -> dict[str, Any] | None:
    """Figures from the ranks of this launcher, or of one that is started; None in ranks that print nothing."""
    if plan.recipe is None:
        raise ConfigError(f"{args.recipe}: --measure needs a recipe, which says the model and the batch")
    if started_by_a_launcher():
        from qsr_engine.local_steps.header import BoundaryError
        from qsr_engine.membership.facts import AgreementError
        from qsr_engine.planning.measure import measure

        try:
            figures = measure(plan.recipe)
        except (AgreementError, BoundaryError) as error:
            raise CommandError(error) from error
        first = os.environ["RANK"] == "0"
        if first and args.measured_to is not None:
            Path(args.measured_to).write_text(json.dumps(figures), encoding="utf-8")
        return figures if first and args.measured_to is None else None
    words = ["plan", args.recipe, *overrides(args)]
    words += [] if args.samples is None else ["--samples", str(args.samples)]
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder) / "measured.json"
        code = launch(plan.recipe, args.ranks, [*words, "--measure", "--measured-to", str(at)])
        if code != 0:
            raise SystemExit(code)
        if not at.exists():
            raise ConfigError("--measure: the launcher ended without an error, and nothing was measured")
        found: dict[str, Any] = json.loads(at.read_text(encoding="utf-8"))
        return found
