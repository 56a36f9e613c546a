"""Compiled code that reads foreign bytes, under the sanitizers of addresses and of undefined behaviour."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from qsr_engine.data import decoding

DATA = Path(decoding.__file__).parent
FLAGS = [
    "-shared",
    "-fPIC",
    "-O1",
    "-g",
    "-ffp-contract=off",
    "-pthread",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]


def runtime(name: str) -> str:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.skipif(not decoding.REGIONS or shutil.which("gcc") is None, reason="needs gcc and libjpeg-turbo")
def test_damaged_jpegs_and_random_plans_under_sanitizers(tmp_path: Path) -> None:
    """Every kind of JPEG, cut, overwritten, with other sizes, bits, sampling and tables. Threads share the buffers."""
    sources = [str(DATA / name) for name in ("_batch.c", "_jpeg.c", "_resize.c", "_pixels.c")]
    module = tmp_path / f"_jpeg{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = f"-I{sysconfig.get_paths()['include']}"
    subprocess.run(["gcc", *FLAGS, include, *sources, "-ljpeg", "-lm", "-o", str(module)], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python leaks at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, str(Path(__file__).with_name("pictures.py")), str(tmp_path), "4000", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    good, bad = map(int, done.stdout.split())
    assert good > 500
    assert bad > 500
