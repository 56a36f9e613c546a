import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from qsr_engine.data import write_digits

# In continuous integration every run tries the same examples, so that a change is judged by what it changed.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# The processes of tests/distributed use one thread each. With another number of threads a matrix product adds in
# another order, and the oracle would differ from them in the last bit.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of scikit-learn's digits, to read and not to change."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder
