"""Results in order, and no more of them than can be taken."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer.ahead import ahead


def test_results_come_in_order_and_no_more_is_begun_than_may_wait() -> None:
    begun: list[int] = []
    lock = threading.Lock()

    def compute(number: int) -> int:
        with lock:
            begun.append(number)
        return number * number

    with ThreadPoolExecutor(4) as pool:
        results = ahead(pool, compute, range(50), 5)
        for number, found in enumerate(results):
            assert found == number * number
            assert len(begun) <= number + 5
    assert sorted(begun) == list(range(50))


def test_an_error_comes_at_its_item_and_ends_them() -> None:
    with ThreadPoolExecutor(1) as pool:
        results = ahead(pool, lambda number: 6 // number, [3, 2, 0, 1], 2)
        assert [next(results), next(results)] == [2, 3]
        with pytest.raises(ZeroDivisionError):
            next(results)
        with pytest.raises(StopIteration):
            next(results)
