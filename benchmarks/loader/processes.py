"""One measurement in a process of its own, perhaps of another Python: `python -m benchmarks.loader.processes JOB`."""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader.data import BATCH, SIZE, Data, random_box
from benchmarks.loader.pictures import PICTURES
from benchmarks.loader.ways import WAYS, Way
from benchmarks.ranks import ROOT
from benchmarks.report import versions

Job = dict[str, Any]


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


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def run_child(job: Job, way: Way, peer_python: Path | None, timeout: float) -> Job:
    """The child's JSON, or {"error": ...}. Everything that the child started is ended with it."""
    python = str(peer_python) if peer_python and not has_module(way.needs) else sys.executable
    words = [python, "-m", "benchmarks.loader.processes", json.dumps({**job, "way": way.name})]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **one_thread}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words,
            env=environment,
            stdout=out,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
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


def main() -> None:
    try:
        answer = child(json.loads(sys.argv[1]))
    except Exception as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps({"answer": answer}), flush=True)


if __name__ == "__main__":
    main()
