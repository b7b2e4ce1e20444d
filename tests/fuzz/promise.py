"""What holds for every input: an answer or a GraftError, soon, in little memory."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from service.errors import GraftError

MAX_S = 2.0
"""Of this process's own time, since other work may share the machine."""
MAX_BYTES = 500 * 2**20
"""That the process may grow beyond the most it ever had, for one input."""

CASES = Path(__file__).parent / "cases"


class Broken(AssertionError):  # noqa: N818
    """The promise was not kept."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed: `run` may raise GraftErrors and nothing else."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    """Valid inputs of every kind, made in code."""
    modules: tuple[str, ...]
    """Whose branches guide the search."""
    max_bytes: int = 4096

    def keeps_its_promise(self, data: bytes) -> None:
        """Runs one input; raises what `run` may not, or Broken for what it cost."""
        grown, started = _peak_bytes(), time.process_time()
        try:
            self.run(data)
        except GraftError as error:
            if not error.message or len(error.message) > 4096:
                raise Broken(f"{len(error.message)} characters of message") from error
        took, grown = time.process_time() - started, _peak_bytes() - grown
        if took > MAX_S:
            raise Broken(f"it took {took:.1f} s")
        if grown > MAX_BYTES:
            raise Broken(f"it took {grown >> 20} MiB")

    def cases(self) -> list[Path]:
        """Inputs that once broke it."""
        folder = CASES / self.name
        return sorted(folder.iterdir()) if folder.is_dir() else []


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
