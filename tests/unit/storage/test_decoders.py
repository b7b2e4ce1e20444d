"""One pool of decoders for all uploads: turns, a limit on pixels, and an end with the caller."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.storage.decoders import Decoders

GUARD_S = 60.0


class Gone(Exception):  # noqa: N818
    """The caller has left."""


class Decoding:
    """Images are their number of pixels; each is decoded until it is let go on."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.lock = threading.Condition()
        self.at_once: list[int] = []
        self.most = 0
        self.done = 0

    def decode(self, data: bytes) -> None:
        with self.lock:
            self.at_once.append(int(data))
            self.most = max(self.most, sum(self.at_once))
            self.lock.notify_all()
        assert self.go_on.wait(GUARD_S)
        with self.lock:
            self.at_once.remove(int(data))
            self.done += 1

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.lock:
            assert self.lock.wait_for(condition, GUARD_S)


def test_no_more_pixels_are_decoded_at_once_than_allowed_but_for_one_image() -> None:
    decoding = Decoding()
    decoders = Decoders(decoding.decode, int, threads=8, max_pixels=10)
    with ThreadPoolExecutor(8) as callers:
        sent = [callers.submit(decoders.check, b"4") for _ in range(6)]
        decoding.wait(lambda: len(decoding.at_once) == 2)
        sent.append(callers.submit(decoders.check, b"50"))
        decoding.go_on.set()
        for one in sent:
            one.result(GUARD_S)
    assert decoding.done == 7
    # Two of four pixels, or the large one alone.
    assert decoding.most == 50


def test_an_upload_fills_the_pool_no_further_than_twice_its_threads() -> None:
    decoders = Decoders(lambda data: None, len, threads=2, max_pixels=10)
    go_on = threading.Event()
    taken: list[int] = []

    def images() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    mapped = decoders.map(lambda _: go_on.wait(GUARD_S), images(), lambda: None)
    with ThreadPoolExecutor(1) as caller:
        first = caller.submit(next, mapped)
        # Another upload's image has its turn before the hundred: only four are before it.
        other = caller.submit(list, decoders.map(str, ["x"], lambda: None))
        go_on.set()
        assert first.result(GUARD_S)
        assert len(taken) == 5
        assert other.result(GUARD_S) == ["x"]
    assert list(mapped) == [True] * 99


def test_what_must_not_go_on_decodes_nothing_more_and_leaves_nothing_under_way() -> None:
    decoding = Decoding()
    decoders = Decoders(decoding.decode, int, threads=2, max_pixels=10)
    is_gone = threading.Event()

    def go_on() -> None:
        if is_gone.is_set():
            raise Gone

    with ThreadPoolExecutor(1) as caller:
        work = caller.submit(list, decoders.map(decoders.check, [b"1"] * 100, go_on))
        decoding.wait(lambda: len(decoding.at_once) == 2)
        is_gone.set()
        decoding.go_on.set()
        with pytest.raises(Gone):
            work.result(GUARD_S)
    assert decoding.at_once == []
    # Those in the pool, and the one that was taken when the first was done.
    assert decoding.done <= 5


def test_who_must_not_go_on_does_not_wait_for_others_images() -> None:
    decoding = Decoding()
    decoders = Decoders(decoding.decode, int, threads=1, max_pixels=10)
    is_gone = threading.Event()

    def go_on() -> None:
        if is_gone.is_set():
            raise Gone

    with ThreadPoolExecutor(2) as callers:
        other = callers.submit(list, decoders.map(decoders.check, [b"1"], lambda: None))
        decoding.wait(lambda: len(decoding.at_once) == 1)
        behind = callers.submit(list, decoders.map(decoders.check, [b"2"], go_on))
        is_gone.set()
        # While the other's image is still being decoded.
        with pytest.raises(Gone):
            behind.result(GUARD_S)
        decoding.go_on.set()
        other.result(GUARD_S)
    assert decoding.done == 1
