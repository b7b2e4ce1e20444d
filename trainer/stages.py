"""Where a job's time went: its stages, one after the other."""

import time


class Stages:
    """A stop watch; the first stage begins with it."""

    def __init__(self, first: str) -> None:
        self._name = first
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """Ends the stage before; a name may come again."""
        now = time.monotonic()
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._began
        self._name, self._began = name, now

    def seconds(self) -> dict[str, float]:
        """Of each stage, the one that goes on included, to the millisecond."""
        self.begin(self._name)
        return {name: round(value, 3) for name, value in self._seconds.items()}
