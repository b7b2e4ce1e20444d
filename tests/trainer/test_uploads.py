"""Batches reach a device whole and in order, through memory that is kept."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trainer.uploads import Batch, Uploads, link_to


class FakeLink:
    """A device to which copies get when somebody waits for them; written memory shows then."""

    def __init__(self) -> None:
        self.allocated: list[int] = []
        self._lock = threading.Lock()

    def pinned(self, nbytes: int) -> torch.Tensor:
        self.allocated.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def send(self, staged: Batch) -> tuple[Batch, Any]:
        moved = tuple(torch.zeros_like(tensor) for tensor in staged)
        return moved, (staged, moved, threading.Event())

    def wait_sent(self, sent: Any) -> None:
        staged, moved, is_over = sent
        with self._lock:
            if not is_over.is_set():
                for source, target in zip(staged, moved, strict=True):
                    target.copy_(source)
                is_over.set()

    def receive(self, batch: Batch, sent: Any) -> None:
        assert all(a is b for a, b in zip(batch, sent[1], strict=True))
        self.wait_sent(sent)


def batches(sizes: list[int], taken: list[int] | None = None) -> Iterator[Batch]:
    for number, size in enumerate(sizes):
        if taken is not None:
            taken.append(number)
        images = torch.full((size, 4, 4, 3), number, dtype=torch.uint8)
        yield images, torch.arange(size) + number


def test_batches_arrive_whole_and_in_order_through_memory_that_is_kept() -> None:
    link = FakeLink()
    uploads = Uploads(link)
    for _ in range(2):
        sizes = [8, 8, 8, 8, 3]
        for number, (images, targets) in enumerate(uploads.moved(batches(sizes))):
            assert images.shape == (sizes[number], 4, 4, 3)
            assert (images == number).all()
            assert targets.tolist() == [number + i for i in range(sizes[number])]
    # Two batches of two tensors, made once.
    assert len(link.allocated) == 4


def test_memory_grows_for_a_larger_batch() -> None:
    link = FakeLink()
    found = [len(images) for images, _ in Uploads(link).moved(batches([2, 2, 5, 5]))]
    assert found == [2, 2, 5, 5]
    assert sorted(link.allocated) == sorted(2 * [2 * 48, 2 * 8, 5 * 48, 5 * 8])


def test_half_precision_maps_keep_their_shape() -> None:
    maps = torch.randn(3, 2, 4, 4).half()
    ((found,),) = Uploads(FakeLink()).moved(iter([(maps,)]))
    assert torch.equal(found, maps)


def test_whoever_leaves_early_leaves_no_thread() -> None:
    before, taken = threading.active_count(), []
    moved = Uploads(FakeLink()).moved(batches([2] * 10, taken))
    next(moved)
    moved.close()
    assert len(taken) <= 3
    assert threading.active_count() == before


def test_an_error_while_a_batch_is_made_ends_them() -> None:
    def broken() -> Iterator[Batch]:
        yield (torch.zeros(1),)
        raise OSError("the file is gone")

    moved = Uploads(FakeLink()).moved(broken())
    next(moved)
    with pytest.raises(OSError, match="gone"):
        next(moved)


def test_on_the_cpu_batches_stay_where_they_are() -> None:
    batch = (torch.zeros(2),)
    (found,) = Uploads(link_to(torch.device("cpu"))).moved(iter([batch]))
    assert found[0] is batch[0]
