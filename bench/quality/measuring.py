"""Runs many small measurements side by side, each on one core, over the same features."""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from threadpoolctl import threadpool_limits

from bench.quality import images
from bench.quality.images import ImageSet, Kept

T = TypeVar("T")


@dataclass(frozen=True)
class Sets:
    """All that is measured on, by name."""

    whole: dict[str, ImageSet]
    filmed: dict[str, ImageSet]
    """Photographs of the same sets, as bursts of frames."""


def load(folder: Path, keep: Path, say: Callable[[str], None], *, has_frames: bool = True) -> Sets:
    """Loads the sets below `folder`, and the digits; computes features that `keep` lacks."""
    kept = Kept(keep, say)
    found = images.find(folder)
    whole = {name: kept.of(name, files) for name, files in found.items()}
    # Scans of digits are no scenes.
    photographed = {name: files for name, files in found.items() if name != images.DIGITS}
    if not has_frames:
        return Sets(whole, {})
    return Sets(whole, {n: kept.filmed(whole[n], files) for n, files in photographed.items()})


class Measuring:
    """A pool of processes that share the features."""

    _sets = Sets({}, {})

    def __init__(self, sets: Sets, processes: int) -> None:
        self.sets = sets
        # Set before the fork, so that no process loads or copies them.
        Measuring._sets = sets
        self._pool = ProcessPoolExecutor(
            processes, multiprocessing.get_context("fork"), _one_thread
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def all(
        self, measure: Callable[..., T | None], tasks: Iterable[tuple[Any, ...]]
    ) -> tuple[list[T], int]:
        """Runs `measure(sets, *task)` for each of `tasks`.

        Returns what it found, in their order, and how often it could measure nothing (None).
        """
        futures = [self._pool.submit(_measure, measure, task) for task in tasks]
        found = [future.result() for future in futures]
        there = [each for each in found if each is not None]
        return there, len(found) - len(there)


def _measure(measure: Callable[..., T], task: tuple[Any, ...]) -> T:
    return measure(Measuring._sets, *task)


def _one_thread() -> None:
    threadpool_limits(1)
