"""Image decoding for uploads: one pool for all of them, with a limit on pixels at once.

Pixels say what an image costs, bytes do not: two kilobytes may be 64 megapixels, and
more than a gigabyte while they are decoded. Uploads take turns, image by image.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_ASK_S = 0.2
"""Between two questions whether to go on, while others decode."""


class Decoders:
    """Decodes the images of uploads; its methods may be called from any thread.

    `pixels` says how many an image has, from its header, and `decode` decodes it; both
    raise a GraftError for bytes that are no image. At most `max_pixels` are decoded at
    once, or one image that has more.
    """

    def __init__(
        self,
        decode: Callable[[bytes], object],
        pixels: Callable[[bytes], int],
        *,
        threads: int,
        max_pixels: int,
    ) -> None:
        self._decode = decode
        self._pixels = pixels
        # Its threads end when nobody holds it any more.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._ahead = 2 * threads
        """Limit on the images of one upload in the pool, so that others come between."""
        self._max_pixels = max_pixels
        self._decoding = 0
        self._freed = threading.Condition()

    def check(self, data: bytes) -> None:
        """Decodes an image and keeps nothing of it; raises a GraftError if it is none."""
        with self._room(self._pixels(data)):
            self._decode(data)

    def map(
        self, work: Callable[[T], R], items: Iterable[T], go_on: Callable[[], None]
    ) -> Iterator[R]:
        """Yields the results of `work` on the pool's threads, in the order of the items.

        Raises what `go_on` raises, which is asked before each item and while one is waited
        for; nothing is under way any more then.
        """
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                go_on()
                if len(ahead) >= self._ahead:
                    yield _first_result(ahead, go_on)
                ahead.append(self._pool.submit(work, item))
            while ahead:
                yield _first_result(ahead, go_on)
        finally:
            # Those that have begun; the others never will.
            wait([future for future in ahead if not future.cancel()])

    @contextmanager
    def _room(self, pixels: int) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(
                lambda: not self._decoding or self._decoding + pixels <= self._max_pixels
            )
            self._decoding += pixels
        try:
            yield
        finally:
            with self._freed:
                self._decoding -= pixels
                self._freed.notify_all()


def _first_result(ahead: deque[Future[R]], go_on: Callable[[], None]) -> R:
    """Waits for the first one, which others' images may be before, and takes it out."""
    go_on()
    while not wait([ahead[0]], _ASK_S).done:
        go_on()
    return ahead.popleft().result()
