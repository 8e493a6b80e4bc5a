"""Waiting for what another process or thread will do, as long as it takes on a machine with much else to do."""

import time

TIMEOUT_SECONDS = 120  # seconds


def until(condition, description="it"):
    "Wait for a condition and return what it gives; fail where it does not come"
    end = time.monotonic() + TIMEOUT_SECONDS
    while not (result := condition()):
        assert time.monotonic() < end, f"{description} did not come in {TIMEOUT_SECONDS} seconds"
        time.sleep(0.02)
    return result
