"""How many training pictures a second does loading give, beside other loaders and the floor of decoding alone?

    python benchmarks/loader.py --shards IMAGENET_SHARDS --scratch FOLDER --json OUT.json
    python benchmarks/loader.py ... --peer-python OTHER/bin/python       # for the peers that this Python has not
    python benchmarks/loader.py ... --rounds 1 --seconds 1 --only qsr_engine Pillow --cores 1 --data originals

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
import contextlib
import importlib
import importlib.util
import io
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hardware import machine, versions
from loader_peers import BASELINE, BATCH, FFCV_JPEG, FLOOR, OURS, PICTURES, SIZE, WAYS, Data, Way, make_base, random_box

SHORT_SIDES = {"originals": None, "short256": 256}
LIMIT = 0.5  # mean difference up to which a way gives the same pictures
LOCAL = ("shards", "scratch", "peer_python", "json", "child")  # arguments that only mean something on this machine
CHILD_SECONDS = 300  # beside the measurement itself; ffcv compiles for half a minute
Job = dict[str, Any]


# --------------------------------------------------------------------------------------------- in a process of its own


def measure(way: Way, data: Data, cores: int, seconds: float) -> Job:
    """Pictures a second in the steady state."""
    processes = 0 if cores == 1 else cores
    warmup = 4 if cores == 1 else 12  # more than any of them prefetches
    started = time.perf_counter()
    batches = way.batches(data, processes)
    first = 0.0
    for _ in range(warmup):
        pictures_in(next(batches))
        first = first or time.perf_counter() - started
    count, pictures = 0, 0
    started = time.perf_counter()
    while True:
        pictures += pictures_in(next(batches))
        count += 1
        taken = time.perf_counter() - started
        # Loader processes deliver in turn, and all of them at about the same time.
        if taken >= seconds and count >= 12 and count % cores == 0:
            return {"rate": pictures / taken, "batches": count, "seconds": taken, "first_batch_seconds": first}


def pictures_in(batch: Any) -> int:
    if isinstance(batch, int):
        return batch
    shape = tuple(batch.shape)
    if shape not in ((BATCH, 3, SIZE, SIZE), (BATCH, SIZE, SIZE, 3)) or "uint8" not in str(batch.dtype):
        raise ValueError(f"a batch has shape {shape} and type {batch.dtype}")
    return BATCH


def difference(picture: str, data: Data, count: int) -> Job:
    """The mean and largest over pictures of their mean absolute difference from Pillow's."""
    from PIL import Image

    draw = random.Random(0)
    values = []
    for number, (_, jpeg, _) in enumerate(data.samples()):
        if number == count:
            break
        with Image.open(io.BytesIO(jpeg)) as image:
            box = random_box(image.width, image.height, draw)
        got, reference = (PICTURES[name](jpeg, box).astype(np.int16) for name in (picture, "pillow"))
        values.append(float(np.abs(got - reference).mean()))
    return {"mean": statistics.mean(values), "largest": max(values), "pictures": len(values)}


def child(job: Job) -> Job:
    way = next(way for way in WAYS if way.name == job["way"])
    data = Data(Path(job["root"]), job["copies"])
    if job["do"] == "prepare":
        importlib.import_module(way.needs)
        if way.prepare:
            way.prepare(data)
        return {"versions": versions("torch", *way.versions), "python": platform.python_version()}
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < job["cores"]:
        raise ValueError(f"{job['cores']} cores are wanted, and {len(allowed)} may be used")
    os.sched_setaffinity(0, allowed[-job["cores"] :])
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)
    if job["do"] == "difference":
        return difference(way.picture, data, job["pictures"])
    return measure(way, data, job["cores"], job["seconds"])


# ------------------------------------------------------------------------------------------------------- in the parent


@dataclass
class Results:
    rates: dict[tuple[str, int, str], dict[int, float]] = field(default_factory=dict)  # data, cores, way; then round
    differences: dict[tuple[str, str], Job] = field(default_factory=dict)  # data, picture
    problems: dict[str, str] = field(default_factory=dict)  # by way
    versions: dict[str, Any] = field(default_factory=dict)  # by way
    raw: list[Job] = field(default_factory=list)

    def ratio(self, data: str, cores: int, way: str, to: str) -> float | None:
        of, base = self.rates.get((data, cores, way), {}), self.rates.get((data, cores, to), {})
        ratios = [of[number] / base[number] for number in of if number in base]
        return statistics.median(ratios) if ratios else None

    def median(self, data: str, cores: int, way: str) -> float | None:
        rates = self.rates.get((data, cores, way))
        return statistics.median(rates.values()) if rates else None

    def difference(self, data: str, way: Way) -> float | None:
        found = self.differences.get((data, way.picture), {}).get("mean")
        return None if found is None else float(found)


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def run_child(job: Job, way: Way, peer_python: str | None, timeout: float) -> Job:
    """The child's JSON, or {"error": ...}. Everything that the child started is ended with it."""
    python = peer_python if peer_python and not has_module(way.needs) else sys.executable
    words = [python, __file__, "--child", json.dumps({**job, "way": way.name})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words, env=environment, stdout=out, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(timeout)
            ending = f"it ended with code {process.returncode}"
        except subprocess.TimeoutExpired:
            ending = f"it did not end within {timeout:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        answers = [line for line in out if line.startswith('{"answer":')]
        if answers:
            answer: Job = json.loads(answers[-1])["answer"]
            return answer
        errors.seek(0)
        last = [line.strip() for line in errors if line.strip()]
        return {"error": f"{ending}: {last[-1][:200] if last else 'it printed no error'}"}


def prepare(arguments: argparse.Namespace, sets: dict[str, Data], ways: list[Way], results: Results) -> None:
    for name, data in sets.items():
        print(f"preparing {name} in {data.root}", flush=True)
        make_base(Path(arguments.shards), data, SHORT_SIDES[name])
        for way in ways:
            if way.name in results.problems:
                continue
            job = {"do": "prepare", "root": str(data.root), "copies": data.copies}
            answer = run_child(job, way, arguments.peer_python, timeout=1800)
            if "error" in answer:
                missing = "ModuleNotFoundError" in answer["error"] or "ImportError" in answer["error"]
                results.problems[way.name] = f"{'not installed' if missing else 'failed'}: {answer['error']}"
            results.versions[way.name] = answer
        pictures = {way.picture: way for way in reversed(ways) if way.name not in results.problems}
        for picture, way in pictures.items():
            if picture in PICTURES:
                job = {"do": "difference", "root": str(data.root), "copies": data.copies, "cores": 1}
                job["pictures"] = arguments.pictures
                results.differences[name, picture] = run_child(job, way, arguments.peer_python, timeout=600)
        for path in data.root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with open(path, "rb") as stream:
                    while stream.read(1 << 24):
                        pass


def measure_all(arguments: argparse.Namespace, sets: dict[str, Data], ways: list[Way], results: Results) -> None:
    draw = random.Random(arguments.seed)
    for number in range(arguments.rounds):
        for name, data in sets.items():
            for cores in arguments.cores:
                order = [way for way in ways if way.name not in results.problems]
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
        write_json(arguments, results)


# --------------------------------------------------------------------------------------------------------------- report


def table(name: str, arguments: argparse.Namespace, ways: list[Way], results: Results) -> list[str]:
    head = [f"{c} core{'s' if c > 1 else ''}: images/s | x Pillow | of the floor" for c in arguments.cores]
    lines = [
        f"\n### {name}\n",
        f"| way | {' | '.join(head)} | mean difference of 255 |",
        f"|---{'|---:' * (3 * len(head) + 1)}|",
    ]
    for way in ways:
        cells = [way.name]
        for cores in arguments.cores:
            cells += rate_cells(results, name, cores, way.name)
        found = results.difference(name, way)
        cells.append("" if way.name == FLOOR else "not measurable" if found is None else f"{found:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines + [f"\n{way}: {problem}" for way, problem in results.problems.items()]


def rate_cells(results: Results, name: str, cores: int, way: str) -> list[str]:
    rates = sorted(results.rates.get((name, cores, way), {}).values())
    if not rates:
        return [results.problems.get(way, "not measured").split(":")[0], "", ""]
    low, high = (float(np.quantile(rates, q)) for q in (0.25, 0.75))
    to_pillow, to_floor = (results.ratio(name, cores, way, to) for to in (BASELINE, FLOOR))
    return [
        f"{statistics.median(rates):,.0f} [{low:,.0f}, {high:,.0f}]",
        f"{to_pillow:.2f}" if to_pillow else "",
        f"{to_floor:.0%}" if to_floor else "",
    ]


def targets(ways: list[Way], results: Results) -> list[str]:
    """What the loader is to reach. A peer counts where its pictures are the same."""
    lines: list[str] = []

    def line(what: str, found: float | None, least: float, show: Callable[[float], str]) -> None:
        verdict = "not measured" if found is None else "pass" if found >= least else "FAIL"
        lines.append(f"| {what} | {show(least)} | {'' if found is None else show(found)} | {verdict} |")

    def times(value: float) -> str:
        return f"{value:.2f} x"

    line(f"originals, 1 core, beside {BASELINE}", results.ratio("originals", 1, OURS, BASELINE), 2.2, times)
    same = [w for w in ways if w.name not in (OURS, FLOOR) and within(results.difference("originals", w))]
    for way in (way for way in same if way.name != BASELINE):
        line(f"originals, 1 core, beside {way.name}", results.ratio("originals", 1, OURS, way.name), 1.5, times)
    best = max(same, key=lambda way: results.median("originals", 2, way.name) or 0, default=None)
    rate = results.median("originals", 2, OURS)
    ratio = results.ratio("originals", 2, OURS, best.name) if best else None
    line("originals, 2 cores, images/s (this or the next line)", rate, 1100, lambda value: f"{value:,.0f}")
    line(f"originals, 2 cores, beside the best, {best.name if best else ''}", ratio, 1.6, times)
    line(f"short256, 1 core, beside {FFCV_JPEG}", results.ratio("short256", 1, OURS, FFCV_JPEG), 1.4, times)
    for name in SHORT_SIDES:
        line(f"{name}, 1 core, of the floor", results.ratio(name, 1, OURS, FLOOR), 0.75, lambda value: f"{value:.0%}")
    return ["\n### Targets\n", "| target | at least | found | |", "|---|---:|---:|---|", *lines]


def within(found: float | None) -> bool:
    return found is not None and found <= LIMIT


def facts(arguments: argparse.Namespace) -> Job:
    from PIL import features

    return {
        **machine("torch", "torchvision", "pillow", "qsr-engine"),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "load": [round(load, 1) for load in os.getloadavg()],
        "pillow_libjpeg_turbo": features.version("libjpeg_turbo"),
        "command": " ".join(["python", *(Path(word).name if word.startswith("/") else word for word in sys.argv)]),
        **{
            name: vars(arguments)[name] for name in ("rounds", "seconds", "cores", "data", "copies", "pictures", "seed")
        },
    }


def write_json(arguments: argparse.Namespace, results: Results) -> None:
    if not arguments.json:
        return
    report = {
        "facts": facts(arguments),
        "problems": results.problems,
        "versions": results.versions,
        "differences": [{"data": d, "picture": p, **found} for (d, p), found in results.differences.items()],
        "measurements": results.raw,
    }
    Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="a folder of tar shards with JPEGs, KEY.jpg and KEY.cls")
    parser.add_argument("--scratch", help="where the formats are made, once; a few gigabytes for 1,000 originals")
    parser.add_argument("--peer-python", help="runs the peers that are not installed here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement, at least")
    parser.add_argument("--cores", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--data", nargs="+", choices=list(SHORT_SIDES), default=list(SHORT_SIDES))
    parser.add_argument("--only", nargs="+", default=[], help="ways whose names contain one of these")
    parser.add_argument("--copies", type=int, default=12, help="of the pictures, so that no epoch ends too early")
    parser.add_argument("--pictures", type=int, default=500, help="for the mean difference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write all figures as JSON, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child and not (arguments.shards and arguments.scratch):
        parser.error("name --shards and --scratch")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.child:
        try:
            answer = child(json.loads(arguments.child))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps({"answer": answer}), flush=True)
        return
    sets = {name: Data(Path(arguments.scratch).resolve() / name, arguments.copies) for name in arguments.data}
    ways = [way for way in WAYS if not arguments.only or any(word in way.name for word in arguments.only)]
    results = Results()
    prepare(arguments, sets, ways, results)
    measure_all(arguments, sets, ways, results)
    for name in sets:
        print("\n".join(table(name, arguments, ways, results)))
    print("\n".join(targets(ways, results)))
    print("\n" + json.dumps(facts(arguments)))
    write_json(arguments, results)


if __name__ == "__main__":
    main()
