"""How many training pictures a second does loading give, beside other loaders and the floor of decoding alone?

    python -m benchmarks.loader --shards IMAGENET_SHARDS --scratch FOLDER --out FOLDER
    python -m benchmarks.loader ... --peer-python OTHER/bin/python       # for the peers that this Python has not
    python -m benchmarks.loader ... --rounds 1 --seconds 1 --only qsr_engine Pillow --cores 1 --data originals

The peers that need an environment of their own (mosaicml-streaming wants an older numpy):

    pip install torch torchvision litdata mosaicml-streaming nvidia-dali-cuda130 ffcv

ffcv is compiled; on Debian it needs libopencv-dev, libturbojpeg0-dev and pkg-config. DALI needs no GPU here.

A picture is cropped at random, resized to 224 pixels and flipped at random; what counts is whole uint8 batches of 64 in
the process that would train. Everything reads the same pictures, in its own format, made once in the scratch folder
(some 5 GB for 1,000 originals):

    originals   the JPEGs of the shards as they are, KEY.jpg and KEY.cls
    short256    their short side resized to 256, JPEG of quality 90

Every measurement is a process of its own. On one core, that process and all that it starts are pinned to one core, and
pictures are decoded in the process itself where the loader can do so, else by one thread or process. On two cores, two
loader processes (ffcv and DALI: threads) decode. The clock starts after warm-up batches and stops after whole rounds
of the loader processes. Each data set is repeated as links or copies, so that no epoch ends inside a measurement; it
lies in the page cache, so no disk is measured.

In every round each way is measured once, in an order drawn anew. The tables give medians over the rounds, quartiles in
brackets; a ratio is the median over rounds of the ratio within a round. The mean difference is that of a way's decoded,
cropped and resized pictures from Pillow's with antialiasing, over 500 pictures with the same fixed crops, in levels of
255; it says which ways give the same pictures. The floor decodes crops drawn alike with libjpeg-turbo, at full size,
and does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

from PIL import features

from benchmarks.loader.data import Data, make_base
from benchmarks.loader.pictures import PICTURES
from benchmarks.loader.processes import run_child
from benchmarks.loader.results import SHORT_SIDES, Results, table, targets
from benchmarks.loader.ways import WAYS, Way
from benchmarks.report import Report, parser

CHILD_SECONDS = 300  # beside the measurement itself; ffcv compiles for half a minute


def prepare(arguments: argparse.Namespace, sets: dict[str, Data], ways: list[Way], results: Results) -> None:
    for name, data in sets.items():
        print(f"preparing {name} in {data.root}", flush=True)
        make_base(arguments.shards, data, SHORT_SIDES[name])
        for way in ways:
            if way.name in results.problems or (name, way.name) in results.prepared:
                continue
            job = {"do": "prepare", "root": str(data.root), "copies": data.copies}
            answer = run_child(job, way, arguments.peer_python, timeout=1800)
            if "error" in answer:
                missing = "ModuleNotFoundError" in answer["error"] or "ImportError" in answer["error"]
                results.problems[way.name] = f"{'not installed' if missing else 'failed'}: {answer['error']}"
            results.versions[way.name] = answer
            results.prepared.add((name, way.name))
        pictures = {way.picture: way for way in reversed(ways) if way.name not in results.problems}
        for picture, way in pictures.items():
            if picture in PICTURES and (name, picture) not in results.differences:
                job = {"do": "difference", "root": str(data.root), "copies": data.copies, "cores": 1}
                job["pictures"] = arguments.pictures
                results.differences[name, picture] = run_child(job, way, arguments.peer_python, timeout=600)
        for path in data.root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with open(path, "rb") as stream:
                    while stream.read(1 << 24):
                        pass


def measure_all(
    arguments: argparse.Namespace, sets: dict[str, Data], ways: list[Way], results: Results, report: Report
) -> None:
    draw = random.Random(f"{arguments.seed} {len(results.raw)}")
    done = 1 + max((found["round"] for found in results.raw), default=-1)
    for number in range(done, done + arguments.rounds):
        for name, data in sets.items():
            for cores in arguments.cores:
                order = [way for way in ways if way.name not in results.problems and cores in way.cores]
                draw.shuffle(order)
                for way in order:
                    job = {"do": "measure", "root": str(data.root), "copies": data.copies, "cores": cores}
                    job["seconds"] = arguments.seconds
                    load = os.getloadavg()[0]
                    answer = run_child(job, way, arguments.peer_python, CHILD_SECONDS + 5 * arguments.seconds)
                    said = f"{answer['rate']:,.0f} images/s" if "rate" in answer else answer["error"]
                    print(f"round {number + 1}, {name}, {cores} cores: {way.name}: {said}", flush=True)
                    told = {"round": number, "data": name, "cores": cores, "way": way.name, "load": load}
                    results.raw.append({**told, **answer})
                    if "rate" in answer:
                        results.rates.setdefault((name, cores, way.name), {})[number] = answer["rate"]
                    else:
                        results.problems[way.name] = f"failed on {name}, {cores} cores: {answer['error']}"
                    keep(report, results)  # a run that is ended is gone on with by --before


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--shards", type=Path, required=True, help="tar shards with JPEGs, KEY.jpg and KEY.cls")
    made.add_argument(
        "--scratch",
        type=Path,
        required=True,
        help="where the formats are made, once",
    )
    made.add_argument("--peer-python", type=Path, help="runs the peers that are not installed here")
    made.add_argument("--before", type=Path, help="a report's JSON: its rounds are taken over, and more are measured")
    made.add_argument("--rounds", type=int, default=5, help="0: make the formats only")
    made.add_argument("--seconds", type=float, default=4.0, help="of one measurement, at least")
    made.add_argument("--cores", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    made.add_argument("--data", nargs="+", choices=list(SHORT_SIDES), default=list(SHORT_SIDES))
    made.add_argument("--only", nargs="+", default=[], help="ways whose names contain one of these")
    made.add_argument("--copies", type=int, default=12, help="of the pictures, so that no epoch ends too early")
    made.add_argument("--pictures", type=int, default=500, help="for the mean difference")
    made.add_argument("--seed", type=int, default=0)
    return made.parse_args()


def keep(report: Report, results: Results) -> None:
    report.save(
        problems=results.problems,
        versions=results.versions,
        prepared=sorted(results.prepared),
        parts=results.parts,
        differences=[{"data": d, "picture": p, **found} for (d, p), found in results.differences.items()],
        measurements=results.raw,
    )


def main() -> None:
    arguments = parse()
    jpeg = {"pillow_libjpeg_turbo": features.version("libjpeg_turbo")}
    report = Report("loader", arguments, ("torch", "torchvision", "pillow", "qsr-engine"), **jpeg)
    sets = {name: Data(arguments.scratch.resolve() / name, arguments.copies) for name in arguments.data}
    ways = [way for way in WAYS if not arguments.only or any(word in way.name for word in arguments.only)]
    results = Results() if arguments.before is None else Results.of(json.loads(arguments.before.read_text()))
    prepare(arguments, sets, ways, results)
    measure_all(arguments, sets, ways, results, report)
    measured = {found["way"] for found in results.raw}
    ways = [way for way in WAYS if way.name in measured or way.name in results.problems]
    for name in SHORT_SIDES:
        report.add(table(name, sorted({found["cores"] for found in results.raw}), ways, results))
    report.add(targets(ways, results))
    report.add("\n".join(f"Part before: `{part['command']}`, load {part['load'][0]:g}." for part in results.parts))
    keep(report, results)


if __name__ == "__main__":
    main()
