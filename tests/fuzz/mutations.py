"""Seeds that are changed at random, and how many."""

from __future__ import annotations

import os

from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("QSR_FUZZ_EXAMPLES", "0"))


def mutated(seeds: list[bytes], tokens: list[bytes]) -> st.SearchStrategy[bytes]:
    """A seed in which a few parts are replaced by tokens, other bytes or parts of another seed."""
    part = st.one_of(st.sampled_from(tokens), st.binary(max_size=4), st.sampled_from(seeds).map(lambda seed: seed[:80]))
    edit = st.tuples(st.integers(0, 10**4), st.integers(0, 60), part)

    def apply(seed: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
        for place, length, new in edits:
            at = place % (len(seed) + 1)
            seed = seed[:at] + new + seed[at + length :]
        return seed

    return st.builds(apply, st.sampled_from(seeds), st.lists(edit, max_size=5))
