"""Which DeepSpeed this package works with: its internals, which the engine relies on, change between minor releases."""

from __future__ import annotations

from collections.abc import Mapping

OLDEST, BEFORE = (0, 19, 8), (0, 20)  # the same bounds stand in pyproject.toml; the tests run the newest


def check_version(version: str) -> None:
    """Raises ImportError, saying what to install, for a DeepSpeed that is too old or too new."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if OLDEST <= numbers < BEFORE:
        return
    oldest, before = (".".join(map(str, bound)) for bound in (OLDEST, BEFORE))
    raise ImportError(
        f"qsr_engine works with DeepSpeed {oldest} and later ones before {before}, and {version} is installed; its "
        f"internals differ between minor releases. Install it with: pip install 'deepspeed>={oldest},<{before}'"
    )


def check_internals(found: Mapping[str, bool], version: str) -> None:
    """Raises ImportError, naming what is missing, for a DeepSpeed that was changed or is not what its version says."""
    missing = [name for name, there in found.items() if not there]
    if missing:
        raise ImportError(
            f"this DeepSpeed ({version}) lacks {', '.join(missing)}, which local steps need; install an unchanged "
            f"release: pip install --force-reinstall 'deepspeed=={'.'.join(map(str, OLDEST))}'"
        )
