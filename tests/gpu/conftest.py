"""Where a test needs a package that is not installed, its module is not collected, and pytest's header says so."""

from __future__ import annotations

from importlib.util import find_spec

NEEDS = {
    "test_averaging_on_gpu.py": ["pydantic"],
    "test_data_on_gpu.py": ["sklearn", "PIL", "pydantic", "torchvision", "cykooz_resizer", "fsspec", "tqdm"],
    "test_engine_on_gpu.py": ["deepspeed", "pydantic"],
    "test_fsdp_on_gpu.py": ["timm", "torchvision", "pydantic"],
}
MISSING = {file: [name for name in names if find_spec(name) is None] for file, names in NEEDS.items()}
collect_ignore = [file for file, names in MISSING.items() if names]


def pytest_report_header() -> list[str]:
    return [f"tests/gpu/{file} needs {', '.join(MISSING[file])}, not installed here" for file in collect_ignore]
