"""What is started as its own command: `qsr train` with checkpoint, resume and export on both engines, and tests/gpu."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu.rows import Found, Row, State, checked
from benchmarks.report import ROOT
from qsr_engine.data import write_digits
from tests.support.recipes import STEPS, small_recipe

TRAIN, TESTS = "qsr train", "tests/gpu"
ENGINES = ("deepspeed", "fsdp")
AT = 7  # where the interrupted run stops
SECONDS = 150


def trained(device: str) -> list[Row]:
    return [
        checked(TRAIN, f"{engine}: saved, resumed, exported", partial(_train, device, engine)) for engine in ENGINES
    ]


def _train(device: str, engine: str) -> Found:
    """The same bits from a run that stopped inside a round and went on, and in what is exported from its checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_digits(folder / "digits")
        recipe = small_recipe(folder, folder / "digits")
        words = ["train", str(recipe), "--engine", engine, "--ranks", "1", "--set", "logging.checkpoint_every=7"]
        _qsr(device, *words, "--set", "logging.name=whole")
        _qsr(device, *words, "--set", "logging.name=parts", "--set", f"stop_at_step={AT}")
        _qsr(device, *words, "--set", "logging.name=parts", "--set", "stop_at_step=null", "--resume")
        whole, parts = (folder / "runs" / run for run in ("whole", "parts"))
        _qsr(device, "export", str(parts / "checkpoints"), str(folder / "exported"))
        files = (whole / "model.safetensors", parts / "model.safetensors", folder / "exported")
        first, resumed, exported = (load_file(path) for path in files)
    apart = [_apart(first, other) for other in (resumed, exported)]
    found = f"{STEPS} steps, stopped after {AT}: resumed {apart[0]:.1e} apart, exported {apart[1]:.1e}"
    return apart == [0, 0], found, {"resumed_apart": apart[0], "exported_apart": apart[1]}


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    if set(one) != set(other):
        raise ValueError(f"the models have other tensors: {sorted(set(one) ^ set(other))[:3]}")
    return max(float((value.double() - other[name].double()).abs().max()) for name, value in one.items())


def _qsr(device: str, *words: str) -> None:
    command = [sys.executable, "-m", "qsr_engine", *words]
    found = subprocess.run(command, **_captured(device), timeout=SECONDS, check=False)
    if found.returncode:
        raise RuntimeError(f"qsr {words[0]} ended with {found.returncode}: {(found.stderr or found.stdout)[-600:]}")


def _captured(device: str) -> dict[str, Any]:
    return {"env": environment(device), "cwd": ROOT, "capture_output": True, "text": True}


def environment(device: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    known = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    return {**known, "PYTHONPATH": path, **({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})}


def tested(device: str, seconds: float) -> list[Row]:
    """A row a test of tests/gpu, of all its cells."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            ended = subprocess.run(command, **_captured(device), timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return [Row(TESTS, "all", "not run", f"they took more than {seconds:.0f} s", seconds)]
        if not report.exists():
            return [Row(TESTS, "all", "failed", (ended.stderr or ended.stdout)[-600:])]
        return rows_of(ElementTree.parse(report).getroot())


def rows_of(report: ElementTree.Element) -> list[Row]:
    """Of pytest's report in JUnit's format."""
    rows: dict[str, Row] = {}
    cells: dict[str, int] = {}
    for case in report.iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2].removeprefix("test_").removesuffix("_on_gpu")
        name = case.get("name", "").partition("[")[0].removeprefix("test_").replace("_", " ")
        check = f"{module}: {name}" if module else case.get("name", "")  # a module that cannot be imported
        row = rows.setdefault(check, Row(TESTS, check, "ok", seconds=0.0))
        cells[check] = cells.get(check, 0) + 1
        row.seconds = (row.seconds or 0.0) + float(case.get("time", 0))
        state, why = _outcome(case)
        if state == "failed" or (state == "not run" and row.state == "ok"):
            row.state, row.found = state, why
    for check, row in rows.items():
        row.found = row.found or f"{cells[check]} cells"
    return list(rows.values())


def _outcome(case: ElementTree.Element) -> tuple[State, str]:
    for tag, state in (("failure", "failed"), ("error", "failed"), ("skipped", "not run")):
        found = case.find(tag)
        if found is not None:
            return state, f"{case.get('name')}: {found.get('message', '')}"  # type: ignore[return-value]
    return "ok", ""
