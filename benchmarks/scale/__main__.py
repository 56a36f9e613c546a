"""How do time, waiting, bytes and what failures cost grow with the number of workers, up to 100,000?

    python -m benchmarks.scale                          # the paper's ViT-B, K from 2 to 100,000; a few minutes
    python -m benchmarks.scale --quick                  # K = 2, 64, 4096 and one run of each; 30 seconds
    python -m benchmarks.scale --out FOLDER             # figures and plots, too
    python -m benchmarks.scale --validate MEASURED.json # beside measured runs; see below

A simulation of discrete events. Rounds come from qsr_engine.schedule, seconds and bytes of an all-reduce from
closed_form.py, whose closed form for the waiting is thereby checked. The number of steps and the time of a step do not
change with K: each worker keeps its batch, so the batch over all workers grows with K. Whether anybody would train so
is not asked.

**A round** of H steps ends for each worker after the sum of H draws. The averaging begins when the last has come. Steps
are drawn independently, with the same mean and cv (standard deviation over mean), from one of

    lognormal  as the closed form has it
    pareto     a shortest time and a Lomax tail of index 3: P(longer than x) falls as 1/x^3, so that 1 step in 10^9 is
               longer by 1,000 scales (58 steps at cv 0.05). No moment above the second is finite
    slow       lognormal, and one worker in 64 takes 10 % longer, always (none where there are fewer workers)

Up to 64 workers every step of every worker is drawn. Beyond, the slowest of n equal workers is drawn at once, from
P(max <= x) = F(x)^n, with F the distribution of a sum of H draws. F is computed by FFT on 2^19 cells, so it is exact up
to a cell (a 50th of the tail's scale) and to tails of 1e-12. What the others computed is then its expectation, given
the slowest. With `slow`, there are two kinds of workers and the later of two such maxima.

**Failures.** Each worker fails after an exponential time, and is replaced by one that does the same; the events wait in
a queue. The others notice when they meet: they finish their steps, and at the boundary the failed one is missing (for
when they meet, the time at which the last of all would have come is taken). All go back to the last checkpoint, after
restart_seconds. What was done since is lost, and done again with new draws and new bytes. With `--notice at_once` a
failure stops all at that moment. Checkpoints are written at the first boundary after so many steps that the time in
between is Young's sqrt(2 x seconds of one x time between two failures of the whole) ("A first order approximation to
the optimum checkpoint interval", 1974), but at most 3,120 steps, as in the recipes.

**Elastic.** Each failure is also simulated as members of a quorum have it (`way`: elastic): the others end the round,
wait at its boundary for --timeout-seconds, and average without the one that failed, whose steps of that round are lost.
It joins again at the first boundary after restart_seconds, which takes as long as a member needs to send its
parameters, m and v. Where somebody fails in the averaging, that is done again. Nothing else is. Checkpoints come every
3,120 steps, as in the recipes. What a quorum itself costs is not in it (benchmarks/quorum.py measures that). Under
`parallel` every step is such a boundary; that is what torchft does for data parallel, not this project.

    time = compute + waiting + communication + saving + lost, for every worker

**Assumptions and their sources.** A step of 0.748 s and an averaging of 0.279 s at K = 16 follow from the paper's 26.7
hours (parallel) and 20.2 hours (QSR) on 2 hosts of 8 GPUs with 25 Gbit/s (Gu et al., arXiv 2310.14423, Figure 5 and the
fit of Appendix F); the efficiency of the network is set so that the model gives that averaging. One failure per worker
in 50,000 hours: 419 unexpected interruptions in 54 days on 16,384 GPUs are 50,676 hours ("The Llama 3 Herd of Models",
arXiv 2407.21783, Section 3.3.4). Nothing is hidden behind the backward pass (--backward-share), since the paper's hours
leave no room for it. Assumed without a source: cv 0.05, the slow workers, 12.5 GB/s inside a host, latencies of 10 and
3 microseconds, 300 s to restart, 10 s to save.

**--validate FILE** simulates measured runs, and prints simulated : measured. measured.py says what is in the file.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.report import Report, parser, table
from benchmarks.scale.measured import read_measured, validation
from benchmarks.scale.plots import plot
from benchmarks.scale.simulation import Failures
from benchmarks.scale.study import WORKERS, Options, Row, paper_check, paper_network, study


def tables(rows: Sequence[Row]) -> str:
    columns = ["strategy", "way", "K", "hours", "least to most", "waiting", "communication", "saving", "lost"]
    columns += ["last round begun", "steps in no average", "TB sent by a worker", "failures", "waiting, hours"]
    columns += ["closed form : simulated waiting"]
    parts = []
    for kind in dict.fromkeys(row.steps for row in rows):
        shown = table(columns, [_cells(row) for row in rows if row.steps == kind])
        parts.append(f"### Step times: {kind}\n\n{shown}")
    return "\n\n".join(parts)


def _cells(row: Row) -> list[str]:
    ratio = row.closed_waiting_hours / row.waiting_hours if row.waiting_hours > 1e-9 else math.nan
    return [
        row.strategy,
        row.way,
        f"{row.workers:,}",
        f"{row.hours:.1f}" + ("" if row.finished else " (called off)"),
        f"{row.least:.1f} to {row.most:.1f}",
        *(f"{100 * share:.1f} %" for share in (row.waiting, row.communication, row.saving, row.lost)),
        f"{row.last_begun:.1f} times",
        f"{1e6 * row.absent:.2f} in 1e6",
        f"{row.bytes / 1e12:.2f}",
        f"{row.failures:.1f}",
        f"{row.waiting_hours:.2f}",
        f"{ratio:.2f}",
    ]


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--workers", type=int, nargs="+", default=list(WORKERS), help="values of K")
    made.add_argument("--runs", type=int, default=20, help="of each strategy and K, with seeds of their own")
    made.add_argument("--cv", type=float, default=0.05, help="of a worker's steps")
    made.add_argument("--mtbf-hours", type=float, default=50_000.0, help="between failures of one worker; inf: none")
    made.add_argument("--restart-seconds", type=float, default=300.0)
    made.add_argument("--save-seconds", type=float, default=10.0)
    made.add_argument("--timeout-seconds", type=float, default=10.0, help="at a boundary, for a member that is lost")
    made.add_argument("--notice", choices=["boundary", "at_once"], default="boundary", help="of a failure")
    made.add_argument("--backward-share", type=float, default=0.0, help="of a step, behind which gradients travel")
    made.add_argument("--quick", action="store_true", help="K = 2, 64 and 4096, one run of each")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--validate", metavar="FILE", help="compare with these measured runs instead")
    arguments = made.parse_args()
    if arguments.runs < 1:
        made.error(f"--runs is {arguments.runs}; write 1 or more")
    return arguments


def main() -> None:
    arguments = parse()
    report = Report("scale", arguments, ("numpy",))
    if arguments.validate:
        measured = read_measured(arguments.validate)
        report.add(validation(measured, arguments.backward_share, arguments.runs, arguments.seed))
        report.save()
        return
    options = Options(
        workers=(2, 64, 4096) if arguments.quick else tuple(arguments.workers),
        runs=1 if arguments.quick else arguments.runs,
        cv=arguments.cv,
        mtbf_hours=arguments.mtbf_hours,
        backward_share=arguments.backward_share,
        failures=Failures(
            restart_seconds=arguments.restart_seconds,
            save_seconds=arguments.save_seconds,
            save_every=3120,
            notice=arguments.notice,
            timeout_seconds=arguments.timeout_seconds,
        ),
        seed=arguments.seed,
    )
    rows = list(study(options))
    report.add(tables(rows))
    report.add(paper_check())
    network, step_seconds = paper_network()
    report.save(step_seconds=step_seconds, network=asdict(network), rows=[asdict(row) for row in rows])
    if report.stem:
        plot(rows, str(report.stem))


if __name__ == "__main__":
    main()
