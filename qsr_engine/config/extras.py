"""Packages of the optional extras of pyproject.toml: one that is missing is named, with the extra that brings it."""

from __future__ import annotations

import importlib.util

from qsr_engine.config.strict import ConfigError


def check_extra(extra: str, module: str, needed_for: str) -> None:
    """Call it before the module is imported; nothing is imported here. Raises ConfigError where it is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"{needed_for} needs {module}, which is not installed; write `pip install 'qsr-engine[{extra}]'`, or in a "
            f"checkout `pip install '.[{extra}]'`"
        )
