"""launch/cluster.sh: hosts made of network namespaces, and DeepSpeed's own launcher across them, by pdsh and ssh."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import slow_network
from tests.support.clusters import PATH, PREFIX, SCRIPT
from tests.support.launch import qsr_job
from tests.support.pool import Processes

pytestmark = pytest.mark.launch

HOSTS = (f"{PREFIX}1", f"{PREFIX}2")


@pytest.fixture(autouse=True)
def _prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_network, "PREFIX", PREFIX)  # a benchmark may run


@pytest.fixture
def state(possible: None, tmp_path: Path) -> Iterator[Path]:
    """The folder of a cluster that a test brings up. After the test nothing is left of it."""
    folder = tmp_path / "cluster"
    before = outside()
    yield folder
    left, done = remains(folder), cluster(folder, "down")
    assert done.returncode == 0, done.stderr
    assert not left, "the test ends with `down`, or with an `up` that failed"
    assert outside() == before


def environment(state: Path, **more: str) -> dict[str, str]:
    ours = {"QSR_PREFIX": PREFIX, "QSR_CLUSTER": str(state), "PATH": PATH}
    return {**os.environ, **ours, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}


def cluster(state: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    known = environment(state, **more)
    return subprocess.run(
        [str(SCRIPT), *words], env=known, cwd=state.parent, capture_output=True, text=True, timeout=300, check=False
    )


def called(state: Path) -> str:
    """The script as one must write it for that cluster; so without it the script acts on another."""
    return f"QSR_PREFIX={PREFIX} QSR_CLUSTER='{state}' {SCRIPT}"


def namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return sorted(line.split()[0] for line in listed.splitlines() if line.startswith(PREFIX))


def ports() -> torch.Tensor:
    """Bytes (sent, received) so far, of each of two hosts."""
    return torch.tensor([slow_network.port_bytes(host) for host in (0, 1)])


def remains(state: Path) -> list[str]:
    """What there is of a cluster: namespaces, its folder, and processes that name it."""
    processes = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if any(str(state) in word for word in process.info["cmdline"] or [])
    ]
    return [*namespaces(), *([str(state)] if state.exists() else []), *map(str, processes)]


def outside() -> list[object]:
    """What must stay as it is: this machine's name, hosts, interfaces, and the user's ssh."""
    user = Path.home() / ".ssh"
    files = [Path("/etc/hosts"), *(sorted(path for path in user.rglob("*") if path.is_file()) if user.exists() else [])]
    contents = [(path, path.read_bytes()) for path in files]
    return [socket.gethostname(), [name for _, name in socket.if_nameindex() if PREFIX in name], contents]


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    """Three averagings of a model of 7 MB; so what else crosses the network is little beside them."""
    path = tmp_path / "across.yaml"
    path.write_text(f"""
model:
  name: timm/vit_tiny_patch16_224
  kwargs: {{img_size: 8, patch_size: 4, embed_dim: 192, depth: 4, num_heads: 3}}
data: {{shards: "{digits}", image_size: 8, augment: crop}}
batch: {{train_batch_size: 32}}
optimizer: {{type: AdamW, weight_decay: 0.05, gradient_clipping: 1.0}}
qsr:
  strategy: constant
  h_base: 2
  total_steps: 6
  lr: {{schedule: constant, peak: 1e-3}}
logging: {{dir: "{tmp_path / "runs"}", every: 2, eval_every: 6}}
""")
    return path


@pytest.mark.slow
def test_deepspeed_trains_across_two_hosts(state: Path, recipe: Path, processes: Processes) -> None:
    """The command of docs/clusters.md; the bytes on the wire are those that the run says, and the model is that of two
    local ranks, bit for bit: so both hosts trained and were averaged."""
    up = cluster(state, "up", "2", "200mbit")
    assert up.returncode == 0, up.stderr
    assert (state / "hosts").read_text() == "".join(f"{host} slots=1\n" for host in HOSTS)
    again = cluster(state, "up", "2")
    assert again.returncode == 1, "and the first one stays up"
    assert f"write first: {called(state)} down" in again.stderr

    before = ports()
    command = ["deepspeed", "--hostfile", str(state / "hosts"), "--module", "qsr_engine", "train", str(recipe)]
    done = cluster(state, "run", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    (sent, received), (sent_by_other, _) = (ports() - before).tolist()
    summary = json.loads((recipe.parent / "runs" / "across" / "summary.json").read_text())
    assert (summary["ranks"], summary["averagings"]) == (2, 3)

    # Above the averagings: headers, acknowledgements, ssh, the launcher's and the evaluation's messages. They came to
    # 0.4 %; headers alone would be 4.6 % (66 bytes of 1,448) if the kernel merged no segments. One averaging more is
    # 33 %. Rank 0 sends its model as well, once at the beginning.
    model = load_file(recipe.parent / "runs" / "across" / "model.safetensors")
    payload = sum(tensor.numel() * 4 for tensor in model.values())
    assert 1 <= sent_by_other / summary["bytes_sent"] < 1.06
    assert 1 <= sent / (summary["bytes_sent"] + payload) < 1.06
    assert received == pytest.approx(sent_by_other, abs=10_000), "but for a few frames of the switch's own"

    here = ["train", str(recipe), "--set", "logging.name=here"]
    assert [code for code, _, _ in processes.run(qsr_job, argv=here)] == [0, 0]
    local = load_file(recipe.parent / "runs" / "here" / "model.safetensors")
    assert all(torch.equal(model[name], local[name]) for name in model)

    # Something that nobody waits for, on the second host, which the first one reaches.
    stay = f"setsid sh -c 'sleep 1000; : {state}' </dev/null >/dev/null 2>&1 & hostname"
    assert cluster(state, "run", "ssh", HOSTS[1], stay).stdout.strip() == HOSTS[1]
    assert any("sleep 1000" in left for left in remains(state))
    down = cluster(state, "down")
    assert down.returncode == 0, down.stderr
    assert remains(state) == []
    assert cluster(state, "down").returncode == 0, "may be called twice"


def test_a_rate_that_tc_does_not_take_leaves_nothing(state: Path) -> None:
    """It looks like one, so it is refused when the first host is there already: tc rounds it to 0 bytes/s."""
    done = cluster(state, "up", "2", "0.001kbit")
    assert done.returncode == 1
    assert "tc does not take '0.001kbit' as a rate; write for example 100mbit or 1gbit" in done.stderr
    assert remains(state) == []


def test_what_up_prints_acts_on_that_cluster(state: Path) -> None:
    """Copied into a shell that knows nothing of it."""
    up = cluster(state, "up", "1", "1.5gbit")
    assert up.returncode == 0, up.stderr
    _, train, down = up.stdout.splitlines()
    assert train.startswith(f"  DS_ACCELERATOR=cpu {called(state)} run deepspeed --hostfile {state}/hosts ")
    assert down == f"  {called(state)} down"
    shell = {name: value for name, value in environment(state).items() if not name.startswith("QSR_")}
    subprocess.run(["bash", "-c", down], env=shell, timeout=60, check=True)
    assert remains(state) == []


_WITH_SIGINT = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_up_that_is_interrupted_leaves_nothing(state: Path, number: signal.Signals) -> None:
    # A shell's background jobs ignore SIGINT, and so would what they start.
    words = [sys.executable, "-c", _WITH_SIGINT, str(SCRIPT), "up", "40"]
    with subprocess.Popen(words, env=environment(state), stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while HOSTS[0] not in namespaces():  # 39 hosts are still to come
            assert process.poll() is None
            assert time.monotonic() < deadline
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
    assert remains(state) == []


def test_a_folder_of_others_is_left_alone(state: Path) -> None:
    state.mkdir()
    (state / "thesis.txt").write_text("dear")
    assert cluster(state, "up", "2").returncode == 1
    assert cluster(state, "down").returncode == 0
    assert (state / "thesis.txt").read_text() == "dear"
    shutil.rmtree(state)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up"], "found 'up'; write: up N [RATE], run COMMAND ..., or down"),
        (["up", "two"], "found 'two' for the number of hosts; write one from 1 to 250"),
        (["up", "0"], "found '0' for the number of hosts"),
        (["up", "08"], "found '08' for the number of hosts"),
        (["up", "251"], "found '251' for the number of hosts"),
        (["up", "18446744073709551617"], "for the number of hosts"),  # 1 in the 64 bits of a shell
        (["up", "2", "nonsense"], "found 'nonsense' for the rate; write for example 100mbit or 1gbit"),
        (["up", "2", "-5mbit"], "found '-5mbit' for the rate"),
        (["up", "2", "100"], "found '100' for the rate"),  # tc would take bits/s
        (["up", "2", "0mbit"], "found '0mbit' for the rate"),
        (["up", "2", "1.gbit"], "found '1.gbit' for the rate"),
        (["up", "2", "1gbit latency 1s"], "found '1gbit latency 1s' for the rate"),
        (["up", "2", ""], "found '' for the rate"),
        (["run"], "found 'run'; write"),
    ],
)
def test_what_it_does_not_understand(state: Path, words: list[str], said: str) -> None:
    done = cluster(state, *words)
    assert done.returncode == 1
    assert said in done.stderr
    assert remains(state) == []


@pytest.mark.parametrize("slots", ["abc", "0", "02", "-1", "2 3"])
def test_slots_that_are_no_number(state: Path, slots: str) -> None:
    done = cluster(state, "up", "2", SLOTS=slots)
    assert done.returncode == 1
    assert f"found '{slots}' for SLOTS, ranks on a host; write one from 1 to 999" in done.stderr
    assert remains(state) == []


@pytest.mark.parametrize(("variables", "host"), [({}, 1), ({"HOST": "laptop"}, 1), ({"QSR_HOST": "2"}, 2)])
def test_the_host_of_run(state: Path, variables: dict[str, str], host: int) -> None:
    """Some shells export HOST, this machine's name."""
    done = cluster(state, "run", "true", **variables)
    assert done.returncode == 1
    assert f"there is no host {PREFIX}{host}; write first: {called(state)} up N" in done.stderr


def test_missing_programs_are_named(state: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for name in ("bash", "id", "realpath"):
        found = shutil.which(name)
        assert found
        (tmp_path / "few" / name).symlink_to(found)
    done = cluster(state, "up", "2", PATH=str(tmp_path / "few"))
    assert done.returncode == 1
    assert "these programs are missing:" in done.stderr
    assert "pdsh (Debian: pdsh)" in done.stderr


def test_without_root_it_says_so() -> None:
    """The script comes from standard input: another user may not read this folder."""
    words = ["bash", "-s", "up", "2"]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("setpriv (util-linux) is missing, which runs a command as another user")
        words = ["setpriv", "--reuid=65534", "--clear-groups", *words]
    done = subprocess.run(words, stdin=SCRIPT.open(), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "network namespaces need root; found user " in done.stderr


def test_the_benchmarks_network(possible: None) -> None:
    """Every cable has the rate at both ends. A message of known length, as both ports and the sender count it."""
    size = 1_000_000
    listen = "import socket; s = socket.create_server(('', 29500)); print('up', flush=True); c = s.accept()[0]"
    listen += "\nwhile c.recv(1 << 20): pass"
    talk = "import socket; from benchmarks.slow_network import bytes_sent; before = bytes_sent()"
    talk += f"\nsocket.create_connection(('{slow_network.address(1)}', 29500)).sendall(bytes({size}))"
    talk += "\nprint(bytes_sent() - before)"
    with slow_network.slow_network(2, "1gbit") as hosts:
        with pytest.raises(RuntimeError, match=f"write first: QSR_PREFIX={PREFIX} "):
            slow_network.slow_network(2, None).__enter__()
        for place in ("br port1", "br port2", "1 eth0", "2 eth0"):
            namespace, device = place.split()
            words = ["tc", "-n", f"{PREFIX}{namespace}", "qdisc", "show", "dev", device]
            assert "tbf" in (limit := subprocess.run(words, capture_output=True, text=True, check=True).stdout)
            assert "rate 1Gbit" in limit
        before = ports()
        words = [*hosts[1], sys.executable, "-c", listen]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as listener:
            assert listener.stdout
            assert listener.stdout.readline() == "up\n"
            known = {**os.environ, "PYTHONPATH": str(Path(slow_network.__file__).parents[1])}
            words = [*hosts[0], sys.executable, "-c", talk]
            said = subprocess.run(words, env=known, capture_output=True, text=True, check=True).stdout
            assert listener.wait(timeout=60) == 0
        (sent, received_back), (sent_back, received) = (ports() - before).tolist()
    # Above the message: headers, 66 bytes of 1,514 where segments are not merged. What the sender has handed over may
    # still wait in a queue, so its own count may be lower.
    assert size <= sent < 1.06 * size
    assert size <= received < 1.06 * size
    assert max(sent_back, received_back) < 0.06 * size
    assert 0 < int(said) < 1.06 * size
    assert slow_network.bytes_sent() is None
    assert namespaces() == []
