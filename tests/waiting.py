"""Waiting for what another process or thread will do, as long as it takes on a machine with much else to do."""

import time

PATIENCE = 120  # seconds


def until(true, what="it"):
    "Wait for a condition and return what it gives; fail where it does not come"
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, f"{what} did not come in {PATIENCE} seconds"
        time.sleep(0.02)
    return found
