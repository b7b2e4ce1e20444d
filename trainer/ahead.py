"""Computes results in threads, in order and no further ahead than they can be taken."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    pool: Executor, compute: Callable[[T], R], items: Iterable[T], most: int
) -> Generator[R, None, None]:
    """Yields `compute` of each item; at most `most` are computed, or wait to be taken, at once.

    Raises what `compute` does, at its item. Those that nobody takes are not begun.
    """
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(compute, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
