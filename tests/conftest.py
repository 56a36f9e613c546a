import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.support.pool import Processes
from tests.support.skips import Skips

# A machine with a GPU for tests/gpu may have torch and pytest alone: what else is needed is imported where it is used.
with suppress(ImportError):
    from hypothesis import settings

    # In continuous integration every run tries the same examples, so that a change is judged by what it changed.
    settings.register_profile("ci", derandomize=True, deadline=None)
    settings.register_profile("local", deadline=None)
    settings.load_profile("ci" if os.environ.get("CI") else "local")

# The processes of the pool use one thread each. With another number of threads a matrix product adds in another order,
# and the oracle would differ from them in the last bit.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # pytest-xdist's workers send their reports to the process that shows them
        config.pluginmanager.register(Skips())


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `fast_cells(count)` so many cells stay in the fast part, the first and the last among them, and
    there are two more in the slow part, or with `of=number` as many as make so many in all."""
    cells: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("fast_cells"):
            cells.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left_out: set[str] = set()
    for of_one_test in cells.values():
        mark = of_one_test[0].get_closest_marker("fast_cells")
        assert mark is not None
        kept = _spread(of_one_test, mark.kwargs.get("of", mark.args[0] + 2))
        left_out |= {item.nodeid for item in of_one_test} - {item.nodeid for item in kept}
        fast = {item.nodeid for item in _spread(kept, mark.args[0])}
        for item in kept:
            if item.nodeid not in fast:
                item.add_marker(pytest.mark.slow)
    items[:] = [item for item in items if item.nodeid not in left_out]


def _spread(items: list[pytest.Item], count: int) -> list[pytest.Item]:
    """So many of them, evenly spread, the first and the last among them."""
    last = len(items) - 1
    chosen = {round(cell * last / max(1, count - 1)) for cell in range(min(count, len(items)))}
    return [item for number, item in enumerate(items) if number in chosen]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scikit-learn's digits, to read and not to change."""
    from qsr_engine.data import write_digits

    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture
def recipe(tmp_path: Path, digits: Path) -> Path:
    """A recipe that trains in a second; one file, as a user writes it."""
    from tests.support.recipes import small_recipe

    return small_recipe(tmp_path, digits)


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """One pool for the whole session of this process."""
    pool = Processes()
    yield pool
    pool.stop()
