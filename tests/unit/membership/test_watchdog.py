"""What one rank tells of itself; test_lost_ranks.py has real ranks."""

from __future__ import annotations

import threading
import weakref

from torch.distributed import HashStore  # type: ignore[attr-defined]  # there at run time

from qsr_engine.membership import watchdog
from qsr_engine.membership.judge import Beat


def test_a_process_that_ends_waits_for_nobody() -> None:
    """Else it would look as if somebody waited for this very rank, which has ended: everybody would hear it is lost."""
    store = HashStore()
    ours = watchdog.Liveness(store, 1, 2, 60.0)
    ours.done(1, 0)
    (talk, *_) = (thread for thread in threading.enumerate() if thread.name == "qsr liveness")
    watchdog._end_talk(weakref.ref(ours), talk, threading.Event())
    beat = Beat.decode(store.get("beat 1"))
    assert (beat.state, beat.step, beat.waiting) == ("ended", 1, False)
