"""What is wrong with data, in words for the user."""

from __future__ import annotations


class DataError(RuntimeError):
    """Shards or samples that cannot be used; the message names the file and says what was found."""


class PassingError(DataError):
    """A read that failed in a way that may pass."""

    most_retries: int | None = None  # of this kind of error; None: as many as the configuration says


class DifferentError(PassingError):
    """What was fetched is not what the index says: damaged on its way, which a second try shows, or at its source."""

    most_retries = 1
