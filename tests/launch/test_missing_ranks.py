"""Ranks that never come, as real commands tell it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clusters import rank_on_a_host
from tests.support.pool import free_port

pytestmark = pytest.mark.launch


def test_the_launcher_names_the_missing_host(tmp_path: Path) -> None:
    """DeepSpeed's launcher has the hosts in its command line; here a stand-in has them, and starts rank 0."""
    world = base64.urlsafe_b64encode(json.dumps({"node-a": [0], "node-b": [0, 1]}).encode()).decode()
    rank = "from qsr_engine.membership.roll_call import roll_call\nwith roll_call('gloo'): pass"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], check=True)"
    environment = {**rank_on_a_host(0, 3, free_port()), "QSR_START_SECONDS": "0.5"}
    words = [sys.executable, "-c", launcher, f"--world_info={world}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "missing: ranks 1, 2 of node-b\n" in done.stderr
