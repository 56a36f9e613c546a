"""The roll call before the first process group: hosts that cannot meet, and what each rank is told.

Every rank is a process with a launcher's environment. Where hosts must differ, a job changes what its rank reports of
itself, and says so; tests/hosts has hosts of their own.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest

from tests.support.pool import JobError, Processes

HERE = socket.gethostname()
SHORT = {"QSR_START_SECONDS": "4"}  # in which those that come must have come, at times of their own
# Seconds that an error may take above the limit: rank 0 has 5 to tell the others, and a loaded machine takes its time.
SLACK = 10.0


def meet_job(
    times: int = 1,
    environment: Mapping[str, str] | None = None,
    on_rank: Mapping[int, Mapping[str, str]] | None = None,
    absent: tuple[int, ...] = (),
    other_torch: int | None = None,
    closed_door: int | None = None,
    wrong_token: int | None = None,
    backend: str = "gloo",
    busy_port: bool = False,
) -> tuple[float, str, list[float]]:
    """Meet and sum the ranks, so many times. Returns seconds, the error's text, the sums."""
    import torch
    import torch.distributed as dist

    from qsr_engine.membership import hosts, network, roll_call, versions

    rank = int(os.environ["RANK"])
    sums: list[float] = []
    started = time.monotonic()
    if rank in absent:
        return 0.0, "absent", sums
    with ExitStack() as stack:
        known = {**(environment or {}), **(on_rank or {}).get(rank, {})}
        stack.enter_context(mock.patch.dict(os.environ, known))
        if rank == other_torch:
            other = {**versions.versions(), "torch": "0.0"}
            stack.enter_context(mock.patch.object(roll_call, "versions", return_value=other))
        described = network.Door.described
        if rank == closed_door:

            def close(door: network.Door) -> list[tuple[str, int, str]]:
                where = described(door)
                door.close()
                return where

            stack.enter_context(mock.patch.object(network.Door, "described", close))
        if rank == wrong_token:

            def mistake(door: network.Door) -> list[tuple[str, int, str]]:
                return [(address, port, "f" * 16) for address, port, _ in described(door)]

            stack.enter_context(mock.patch.object(network.Door, "described", mistake))
        if busy_port:
            listening = stack.enter_context(socket.create_server(("", int(os.environ["MASTER_PORT"]))))
            assert listening
        for _ in range(times):
            try:
                with roll_call.roll_call(backend):
                    dist.init_process_group("gloo")
            except hosts.HostError as error:
                return time.monotonic() - started, str(error), sums
            total = torch.tensor([float(rank + 1)])
            dist.all_reduce(total)
            sums.append(total.item())
            dist.destroy_process_group()
    return time.monotonic() - started, "", sums


def there_job() -> None:
    """Nothing; but a process that has just been started imports this module and what it needs for it."""
    import torch.distributed as dist

    from qsr_engine.membership import roll_call

    assert dist.is_available()
    assert roll_call.__file__


def told(processes: Processes, ranks: int, limit: float = 4.0, absent: tuple[int, ...] = (), **kwargs: Any) -> str:
    """What the ranks that came are told; all of them the same, in time."""
    processes.run(there_job, ranks=ranks)  # the time that the others have is that of coming, not of importing torch
    found = processes.run(meet_job, ranks=ranks, absent=absent, **kwargs)
    came = [result for rank, result in enumerate(found) if rank not in absent]
    for seconds, text, sums in came:
        assert text == came[0][1]
        assert text
        assert not sums
        assert seconds < limit + SLACK
    return str(came[0][1])


def test_ranks_meet_before_every_process_group(processes: Processes) -> None:
    """Twice at the same address: the second store is not taken for the first."""
    for _, text, sums in processes.run(meet_job, ranks=2, times=2, environment={"CROSS_RANK": ""}):
        assert text == ""
        assert sums == [3.0, 3.0]


def test_hosts_reach_one_another(processes: Processes) -> None:
    """Three hosts of the launcher, all on this one; so their doors are tried."""
    with_nodes = {rank: {"CROSS_RANK": str(rank)} for rank in range(3)}
    for _, text, sums in processes.run(meet_job, ranks=3, on_rank=with_nodes):
        assert text == ""
        assert sums == [6.0]


def test_missing_ranks_are_named(processes: Processes) -> None:
    on_rank = {rank: {"LOCAL_SIZE": "2"} for rank in range(4)}
    text = told(processes, 4, absent=(1, 3), environment=SHORT, on_rank=on_rank)
    assert text.startswith("2 of 4 ranks did not come within 4 s (QSR_START_SECONDS):\n")
    assert f"  missing: ranks 1, 3 of {HERE}\n" in text, "the others of each host came, and say its name"
    assert f"  there: ranks 0, 2 of {HERE}\n" in text
    text = told(processes, 4, absent=(2, 3), environment=SHORT, on_rank=on_rank)
    assert "  missing: ranks 2, 3 of host number 1\n" in text, "which nobody has named"


def test_other_versions_are_named(processes: Processes) -> None:
    """Rank 2 says that it has another torch."""
    import torch

    text = told(processes, 3, other_torch=2, limit=60)
    assert f"  torch: {torch.__version__} on rank 0 ({HERE}), rank 1 ({HERE}); 0.0 on rank 2 ({HERE})\n" in text
    assert text.count("\n  ") == 1, "nothing else differs"


def test_other_numbers_of_ranks_are_named(processes: Processes) -> None:
    text = told(processes, 2, on_rank={1: {"WORLD_SIZE": "3"}}, limit=60)
    assert f"  ranks (WORLD_SIZE): 2 on rank 0 ({HERE}); 3 on rank 1 ({HERE})\n" in text


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("backend", "name"), [("gloo", "GLOO_SOCKET_IFNAME"), ("nccl", "NCCL_SOCKET_IFNAME")])
def test_an_interface_that_is_not_there(processes: Processes, backend: str, name: str, rank: int) -> None:
    """Known at once, long before the limit, and on both ranks."""
    text = told(processes, 2, backend=backend, on_rank={rank: {name: "nosuch0"}}, limit=60)
    assert f"{name} is 'nosuch0', " in text
    assert f"on host {HERE}. Interfaces with an IP address there: lo" in text


def test_a_host_that_is_not_reached(processes: Processes) -> None:
    """The door of rank 2 is closed before others try it; each launcher's host has one rank."""
    with_nodes = {rank: {"CROSS_RANK": str(rank)} for rank in range(3)}
    text = told(processes, 3, on_rank=with_nodes, closed_door=2, limit=60)
    assert text.startswith("hosts do not reach one another:\n")
    for rank in (0, 1):
        assert f"  from {HERE} number {rank} (rank {rank}) to {HERE} number 2 (rank 2) at " in text
    assert text.count("Connection refused") == 2


def test_two_hosts_with_the_same_address(processes: Processes) -> None:
    """Rank 1 says another token than its door: as where its address leads to another host."""
    with_nodes = {rank: {"CROSS_RANK": str(rank)} for rank in range(2)}
    text = told(processes, 2, on_rank=with_nodes, wrong_token=1, limit=60)
    assert "another host or program answers at that address" in text
    assert text.count("\n  from ") == 1, "rank 0 is reached"


def test_nobody_listens(processes: Processes) -> None:
    text = told(processes, 2, absent=(0,), environment={"QSR_START_SECONDS": "1"})
    assert f"rank 1 on {HERE} did not reach rank 0 at 127.0.0.1:" in text
    assert "in 1 s (QSR_START_SECONDS): that host answers, and nobody listens on the port" in text


def unresolved_job() -> str:
    """The name server is a stand-in, which answers as one does for a name that it does not know."""
    from qsr_engine.membership.hosts import HostError
    from qsr_engine.membership.roll_call import roll_call

    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    ours = {"MASTER_ADDR": "node-x", "QSR_START_SECONDS": "1"}
    with (
        mock.patch.dict(os.environ, ours),
        mock.patch.object(socket, "getaddrinfo", side_effect=unknown),
        pytest.raises(HostError) as caught,
        roll_call("gloo"),
    ):
        pass
    return str(caught.value)


def test_a_name_that_does_not_resolve(processes: Processes) -> None:
    for rank, text in enumerate(processes.run(unresolved_job)):
        assert f"rank {rank} on {HERE}: the name 'node-x' (MASTER_ADDR) does not resolve on this host" in text


def test_a_port_that_is_taken(processes: Processes) -> None:
    text = told(processes, 1, busy_port=True)
    assert "(MASTER_PORT) is taken by another process on this host" in text


@pytest.mark.slow
def test_a_server_that_says_nothing(processes: Processes) -> None:
    """It takes connections, as the port of a process that hangs; torch's client would wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = {1: {"MASTER_PORT": str(silent.getsockname()[1]), "QSR_START_SECONDS": "1"}}
        text = told(processes, 2, absent=(0,), on_rank=where)
    assert "is not rank 0 of this run, or hangs" in text


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan", "1e10"])
def test_the_limit_is_a_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from qsr_engine.membership.hosts import HostError
    from qsr_engine.membership.rendezvous import start_seconds

    monkeypatch.setenv("QSR_START_SECONDS", text)
    with pytest.raises(HostError, match=f"QSR_START_SECONDS is '{text}'; write the seconds"):
        start_seconds()


def agents_job(port: int, after: bool, absent: bool) -> str:
    """Under torchrun, whose agent keeps the server through restarts. With `after`, rank 0 begins when rank 1 has
    answered the call before this one, whose outcome is still there."""
    import torch.distributed as dist

    from qsr_engine.membership import roll_call
    from qsr_engine.membership.hosts import HostError

    rank = int(os.environ["RANK"])
    agent = {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "QSR_START_SECONDS": "5"}
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    answer = roll_call._Call._answer_call
    if rank == 1 and absent:
        return ""

    def answer_and_tell(call: Any, name: str) -> None:
        answer(call, name)
        store.set(f"answered {rank}", "1")

    with mock.patch.dict(os.environ, agent), mock.patch.object(roll_call._Call, "_answer_call", answer_and_tell):
        if after and rank == 0:
            store.wait(["answered 1"])
        try:
            with roll_call.roll_call("gloo"):
                return "met"
        except HostError as error:
            return str(error)


def test_an_earlier_call_is_not_taken_for_this_one(processes: Processes) -> None:
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    assert processes.run(agents_job, port=agent.port, after=False, absent=False) == ["met", "met"]
    agent.delete_key("answered 1")
    assert processes.run(agents_job, port=agent.port, after=True, absent=False) == ["met", "met"]
    alone = processes.run(agents_job, port=agent.port, after=False, absent=True)[0]
    assert "1 of 2 ranks did not come" in alone


def versions_job() -> None:
    """The process group is there already; rank 1 says that it has another torch."""
    import torch
    import torch.distributed as dist

    import qsr_engine
    from qsr_engine.engines import start
    from qsr_engine.membership.versions import versions

    dist.init_process_group("gloo")
    other = {**versions(), **({"torch": "0.0"} if dist.get_rank() == 1 else {})}
    config = {
        "train_batch_size": 8,
        "qsr": {"strategy": "constant", "h_base": 2, "total_steps": 4, "lr": {"schedule": "constant", "peak": 0.1}},
    }
    with mock.patch.object(start, "versions", return_value=other):
        qsr_engine.initialize_fsdp(
            model=torch.nn.Linear(2, 1), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), config=config
        )


def test_versions_are_compared_where_others_made_the_process_group(processes: Processes) -> None:
    with pytest.raises(JobError) as caught:
        processes.run(versions_job)
    for error in caught.value.by_rank:
        assert error is not None
        assert error[0] == "AgreementError"
        assert "  versions.torch: " in error[1]
        assert "'0.0' on rank 1\n" in error[1]


def wrong_on_rank_1_job(engine: str) -> None:
    import torch

    import qsr_engine

    h_base = 2 if os.environ["RANK"] == "0" else -2
    rates = {"schedule": "constant", "peak": 0.1}
    config = {"train_batch_size": 8, "qsr": {"strategy": "constant", "h_base": h_base, "total_steps": 4, "lr": rates}}
    model, adam = torch.nn.Linear(2, 1), torch.optim.Adam
    if engine == "fsdp":
        qsr_engine.initialize_fsdp(model=model, optimizer=adam, config=config)
    else:
        qsr_engine.initialize(model=model, optimizer=adam(model.parameters()), config=config)


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_a_configuration_that_is_wrong_on_one_rank_ends_all(processes: Processes, engine: str) -> None:
    """At once: the others do not wait for a rank that has ended."""
    with pytest.raises(JobError) as caught:
        processes.run(wrong_on_rank_1_job, seconds=30, engine=engine)
    first, second = caught.value.by_rank
    assert first is not None
    assert second is not None
    assert first[0] == "HostError"
    assert "rank 1" in first[1]
    assert "qsr.h_base" in first[1]
    assert second[0] == "ConfigError"
