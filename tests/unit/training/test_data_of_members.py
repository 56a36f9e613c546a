"""What members read when workers come and go, and how it is counted. All members are in this process: their part in the
loop and their loaders are the real ones, and which samples each of them was given is written down."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qsr_engine.config.batch import Batch, Dealing, Part
from qsr_engine.config.recipe import Recipe
from qsr_engine.config.recipe_file import load_recipe
from qsr_engine.data import Index, read_index
from qsr_engine.data import coverage as coverage_module
from qsr_engine.data.loader import TrainLoader
from qsr_engine.data.order import epoch_of
from qsr_engine.local_steps.member import Standing
from qsr_engine.training.attendance import Attendance
from qsr_engine.training.batches import Batches
from qsr_engine.training.figures import Clock

MICRO, H = 8, 7
COUNTS = ("samples_lost", "samples_twice", "samples_missed")


@pytest.mark.parametrize(
    ("dealing", "members", "parts", "samples"),
    [
        (Dealing(8, 1, 2), 3, [(2, 0, 1), (2, 1, 1), (2, 2, 1)], 48),
        (Dealing(8, 2, 1), 2, [(1, 0, 1), (1, 2, 1)], 32),
        (Dealing(8, 1, 1, 24), 3, [(1, 0, 1), (1, 1, 1), (1, 2, 1)], 24),
        (Dealing(8, 1, 1, 24), 2, [(2, 0, 2), (1, 2, 1)], 24),
        (Dealing(8, 1, 1, 24), 1, [(3, 0, 3)], 24),
        (
            Dealing(8, 1, 1, 24),
            4,
            [(1, 0, 1), (1, 1, 1), (1, 2, 1), (1, 3, 1)],
            32,
        ),  # more than there are micro-batches
        (Dealing(4, 2, 1, 40), 2, [(3, 0, 3), (2, 6, 2)], 40),
        (Dealing(8, 2, 1, 40), 2, [(2, 0, 2), (1, 4, 1)], 48),  # 40 samples are two parts of 16 and a half
        (Dealing(8, 1, 1, 20), 2, [(2, 0, 2), (1, 2, 1)], 24),  # the checkpoint's micro-batches, and another batch
        (Dealing(8, 1, 1, 3), 1, [(1, 0, 1)], 8),
    ],
)
def test_how_a_step_is_divided(dealing: Dealing, members: int, parts: list[tuple[int, int, int]], samples: int) -> None:
    found = [dealing.part(place, members) for place in range(members)]
    assert [(one.accumulation, one.first, one.count) for one in found] == parts
    assert {one.samples for one in found} == {samples}
    assert samples == sum(one.accumulation for one in found) * dealing.ranks * dealing.micro


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kept", [None, 5 * 24, 64])
def test_every_stream_has_one_rank(ranks: int, kept: int | None) -> None:
    for members in range(1, 9):
        parts = [Dealing(8, ranks, 2, kept).part(place, members) for place in range(members)]
        taken = [n for part in parts for rank in range(ranks) for n in streams(part, rank)]
        assert taken == list(range(parts[0].streams))


def streams(part: Part, rank: int) -> range:
    return range(part.first + rank * part.count, part.first + (rank + 1) * part.count)


class Member:
    """One worker's ranks."""

    def __init__(self, recipe: Recipe, index: Index, dealing: Dealing) -> None:
        task: Any = SimpleNamespace(index=index, training_batch=lambda batch: batch)
        self.sizes: list[int] = []  # that the engine was told
        engine: Any = SimpleNamespace(
            set_train_batch_size=self.sizes.append, local_steps=SimpleNamespace(finished=False)
        )
        batch = Batch(dealing.micro * dealing.accumulation * dealing.ranks, dealing.micro, dealing.accumulation)
        self.ranks = []
        for _ in range(dealing.ranks):
            batches = Batches(recipe, task, batch, torch.device("cpu"), step=0, clock=Clock())
            samples = index.split(recipe.data.train).samples
            self.ranks.append((batches, Attendance(recipe, {}, batches, dealing, engine, samples)))


class Members:
    """A run of members, who all stand at the same step; `times` is how often who was given each sample, by epoch."""

    def __init__(self, recipe: Recipe, dealing: Dealing, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recipe, self.dealing = recipe, dealing
        self.index = read_index(recipe.data.shards)
        self.samples = self.index.split(recipe.data.train).samples
        self.there: dict[str, Member] = {}
        self.frozen: dict[str, Member] = {}  # which may come back
        self.times: dict[int, Counter[Any]] = defaultdict(Counter)
        self.events: list[dict[str, Any]] = []
        self.read_late: dict[str, int] = {}  # in their last round, by those who were not there at its end
        self.step = self.lost = self.read = 0
        monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: dealing.ranks)
        monkeypatch.setattr(TrainLoader, "batches", self._batches())

    def _batches(self) -> Any:
        run = self

        def batches(self: TrainLoader, start: int, *given: Any) -> Iterator[Any]:
            own = self._streams
            for number, batch in enumerate(self.raw_batches(start), start):
                stream, first = own[number % len(own)], number // len(own) * self.batch_size
                for place, item in enumerate(batch.items, first):
                    epoch, _ = epoch_of(place, run.samples, stream, self._ranks)
                    run.times[epoch][item] += 1
                run.read += len(batch.items)
                yield SimpleNamespace(skipped=())

        return batches

    def round(self, steps: int) -> dict[str, int]:
        """Everybody trains. Returns the samples that each has read."""
        read = {}
        for name, member in self.there.items():
            before = self.read
            for batches, attendance in member.ranks:
                for _ in range(steps * attendance.accumulation):
                    batches.next()
            read[name] = self.read - before
        self.step += steps
        return read

    def boundary(self, names: list[str], giving: list[str], read: dict[str, int], late: tuple[str, ...] = ()) -> None:
        """So many are there from now on, of whom some had given their parameters; names are old ones or new ones.

        Those who are `late` were not there at the boundary before, and give the movement of that round.
        """
        source = self.there[giving[0]] if giving else None
        for name in names:
            if name not in self.there:
                back = self.frozen.pop(name, None)
                self.there[name] = back or Member(self.recipe, self.index, self.dealing)
        states = [self.there[name].ranks[0][1].state() for name in [*(giving or names[:1]), *late]]
        for name in names:
            for _, attendance in self.there[name].ranks:
                if source is not None and name not in giving:
                    attendance.take(states[0])
                attendance.counted(states[0], states)
        self.lost += sum(read.values()) - sum(read[name] for name in giving) - sum(self.read_late.pop(o) for o in late)
        self.read_late |= {name: read[name] for name in read if name not in giving}
        self.frozen |= {name: member for name, member in self.there.items() if name not in names}
        self.there = {name: self.there[name] for name in names}
        told = []
        for place, name in enumerate(names):
            standing = Standing(tuple(names), place, recorder=place == 0)
            found = [one.stand(standing, self.step, rank) for rank, (_, one) in enumerate(self.there[name].ranks)]
            told.append(found[0])
            assert not any(found[1:])
        self.events += told[0] if not giving or names[0] in giving else told[names.index(giving[0])]

    def counts(self) -> dict[str, int]:
        """As all members have counted."""
        found = [member.ranks[0][1].counts for member in self.there.values()]
        assert all(one == found[0] for one in found)
        assert {name: sum(one.get(name, 0) for one in self.events) for name in COUNTS} == found[0]
        return found[0]

    def truth(self) -> dict[str, int]:
        """Of all epochs but the one that has begun last."""
        whole = [self.times[epoch] for epoch in range(max(self.times))]
        twice = sum(count - 1 for epoch in whole for count in epoch.values())
        missed = sum(self.samples - len(epoch) for epoch in whole)
        return {"samples_lost": self.lost, "samples_twice": twice, "samples_missed": missed}

    def end(self) -> None:
        """Train undisturbed until no epoch is under way that somebody has changed."""
        whole = 2 * self.samples // (MICRO * len(self.there) * self.dealing.ranks) // H + 2
        for _ in range(whole):
            names = list(self.there)
            self.boundary(names, names, self.round(H))


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    from tests.support.recipes import small_recipe

    return small_recipe(tmp_path, digits)


KEEP = Dealing(MICRO, 1, 1, 3 * MICRO)
PER_RANK = Dealing(MICRO, 1, 1)


@pytest.mark.parametrize("shuffle", ["buffer", "samples"])
@pytest.mark.parametrize(
    "dealing",
    [
        pytest.param(KEEP, id="keep"),
        pytest.param(PER_RANK, id="per rank"),
        pytest.param(Dealing(MICRO, 2, 2), id="per rank, 2 ranks"),
        pytest.param(Dealing(MICRO, 2, 1, 6 * MICRO), id="keep, 2 ranks"),
    ],
)
def test_what_comes_twice_and_what_is_lost_is_counted(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, dealing: Dealing, shuffle: str
) -> None:
    """Members die, freeze, are not finite and join, by chance, for three epochs; the counts are those of the samples
    that all of them were really given."""
    draw = random.Random(f"{dealing} {shuffle}")
    made = load_recipe(recipe, [f"data.shuffle={shuffle}", "data.shuffle_buffer=50"])
    run = Members(made, dealing, monkeypatch)
    run.boundary(["0", "1", "2"], [], {})
    new = 3
    while max(run.times, default=0) < 3:
        read = run.round(H)
        names = list(run.there)
        giving = list(names)
        if draw.random() < 0.4 and len(names) > 1:
            giving.remove(draw.choice(names))  # it has died, or falls behind
        stay = names if draw.random() < 0.3 else giving  # it joins at once
        for _ in range(draw.choice([0, 0, 0, 1, 2]) if len(stay) < 5 else 0):
            come, new = (
                (draw.choice(list(run.frozen)), new) if run.frozen and draw.random() < 0.5 else (str(new), new + 1)
            )
            stay = [*stay, *({come} - set(stay))]
        run.boundary(sorted(stay, key=int), giving, read)
    assert len(run.events) >= 3
    run.end()
    assert run.truth() == run.counts()
    assert run.lost > 0
    seen = {batches.samples_seen for member in run.there.values() for batches, _ in member.ranks}
    assert len(seen) == 1


def test_who_keeps_the_batch_reads_every_sample_once_whoever_comes_and_goes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Members(load_recipe(recipe), KEEP, monkeypatch)
    run.boundary(["0", "1", "2"], [], {})
    read = run.round(H)
    run.boundary(["0", "2"], ["0", "2"], read)  # 1 has died
    read = run.round(H)
    assert read == {"0": 16 * H, "2": 8 * H}
    run.boundary(["0"], ["0"], read)  # 2 as well
    run.boundary(["0", "3", "4"], ["0"], run.round(H))
    run.end()
    assert set(run.times[0].values()) == {1}
    assert len(run.times[0]) == run.samples
    assert run.counts() == run.truth() == {"samples_lost": 2 * 8 * H, "samples_twice": 0, "samples_missed": 0}
    assert [event["event"] for event in run.events] == ["data"] * 3
    assert run.there["0"].sizes == [16, 24, 8]


@pytest.mark.parametrize("dealing", [KEEP, PER_RANK])
def test_a_member_that_was_frozen_goes_on_where_the_others_are(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, dealing: Dealing
) -> None:
    """In its old place, and among as many: its stream stands where it fell asleep."""
    run = Members(load_recipe(recipe), dealing, monkeypatch)
    run.boundary(["0", "1", "2"], [], {})
    run.boundary(["0", "1"], ["0", "1"], run.round(H))
    run.boundary(["0", "1"], ["0", "1"], run.round(H))
    run.boundary(["0", "1", "2"], ["0", "1"], run.round(H))
    run.end()
    assert run.counts() == run.truth()
    assert run.counts()["samples_lost"] == MICRO * H


def test_what_a_late_member_has_read_is_lost_until_its_movement_is_in_an_average(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Members(load_recipe(recipe), KEEP, monkeypatch)
    run.boundary(["0", "1", "2"], [], {})
    run.boundary(["0", "1"], ["0", "1"], run.round(H))
    assert run.counts()["samples_lost"] == run.lost == MICRO * H
    run.boundary(["0", "1", "2"], ["0", "1"], run.round(H), late=("2",))
    run.end()
    assert run.counts() == run.truth() == dict.fromkeys(COUNTS, 0)


def test_a_batch_that_cannot_be_kept_is_told(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Members(load_recipe(recipe), KEEP, monkeypatch)
    run.boundary(["0", "1", "2"], [], {})
    run.boundary(["0", "1", "2", "3"], ["0", "1", "2"], run.round(H))
    assert "after step 7 a step has 32 samples, as 4 members divide it" in caplog.text
    assert {"step": 7, "member": "", "members": 4, "event": "batch", "samples": 32} in run.events
    run.boundary(["0", "1", "2"], ["0", "1", "2"], run.round(H))
    assert [event["samples"] for event in run.events if event["event"] == "batch"] == [32, 24]


def test_a_run_that_goes_on_with_fewer_workers_counts_as_one_that_they_have_left(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is of one worker, inside a round: what the others had read in that round is lost."""
    run = Members(load_recipe(recipe), PER_RANK, monkeypatch)
    run.boundary(["0", "1", "2"], [], {})
    run.boundary(["0", "1", "2"], ["0", "1", "2"], run.round(H))
    read = run.round(3)
    batches, attendance = run.there["1"].ranks[0]
    saved = {**batches.state_dict(), **attendance.state_dict()}
    run.there = {}
    for name in ("3", "4"):
        run.there[name] = Member(run.recipe, run.index, run.dealing)
        own, other = run.there[name].ranks[0]
        own.load_state_dict(saved)
        other.load_state_dict(saved)
    states = [run.there["3"].ranks[0][1].state()]
    for place, name in enumerate(("3", "4")):
        found = run.there[name].ranks[0][1]
        found.counted(states[0], states)
        told = found.stand(Standing(("3", "4"), place, place == 0), run.step, 0)
    run.events += told
    run.lost += 2 * read["1"]
    run.end()
    assert run.counts() == run.truth()
    assert run.counts()["samples_lost"] == 2 * 3 * MICRO
    assert run.counts()["samples_twice"] > 0


def test_in_a_large_epoch_the_local_shuffle_is_left_out(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_module, "EXACT", 1000)
    run = Members(load_recipe(recipe, ["data.shuffle_buffer=50"]), PER_RANK, monkeypatch)
    run.boundary(["0", "1", "2"], [], {})
    run.boundary(["0", "1"], ["0", "1"], run.round(3 * H))
    run.end()
    truth, found = run.truth(), run.counts()
    assert [event["exact"] for event in run.events if event["event"] == "data"] == [False]
    assert truth["samples_twice"] != found["samples_twice"]
    assert abs(truth["samples_twice"] - found["samples_twice"]) <= 5 * 50  # a buffer at every position
