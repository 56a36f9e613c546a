"""Packages of the optional extras of pyproject.toml: one that is missing is named, with the extra that brings it."""

from __future__ import annotations

import importlib.util

from qsr_engine.config.strict import ConfigError


def check_extra(extra: str, package: str, needed_for: str, *, module: str | None = None) -> None:
    """Call it before the package's module (of its own name, or `module`) is imported; nothing is imported here.

    Raises ConfigError where it is not installed.
    """
    if importlib.util.find_spec(module or package) is None:
        raise ConfigError(
            f"{needed_for} needs {package}, which is not installed; write `pip install 'qsr-engine[{extra}]'`, or in a "
            f"checkout `pip install '.[{extra}]'`"
        )
