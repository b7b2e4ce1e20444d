"""A clock of the event loop that can be put forward, so that no test waits for a deadline."""

import asyncio


class LoopClock:
    """The running loop's, from now on until the loop's end.

    Whatever waits on the loop for a time goes on as soon as that was skipped, however fast
    or slow the machine is.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._time = loop.time
        self._ahead_s = 0.0
        loop.time = self.now  # type: ignore[method-assign]

    def now(self) -> float:
        """Seconds, as `loop.time`."""
        return self._time() + self._ahead_s

    def skip(self, seconds: float) -> None:
        """Lets so much time have passed."""
        self._ahead_s += seconds
