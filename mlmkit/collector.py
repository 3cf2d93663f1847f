"""Python's garbage collector, kept from searching what stays as long as the process."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Import and load in the block without garbage collection, then put all objects into the oldest generation.

    torch, transformers and a model are a million objects that stay. Searching them again and again for garbage took 2.0
    of the 14.4 processor seconds of `mlmkit score` with a tiny checkpoint.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # otherwise the program has frozen objects, which must stay so
            gc.freeze()
            gc.unfreeze()  # moves them to the oldest generation without a search
        if was_enabled:
            gc.enable()
