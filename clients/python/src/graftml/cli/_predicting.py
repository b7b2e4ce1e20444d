"""Asks models about any number of images: a few calls under way at once, answers in order.

What is held is bounded: the images of `_UNDER_WAY` calls.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from graftml import Client
from graftml._order import IMAGES_A_REQUEST
from graftml.cli._image_files import ImageFile
from graftml.errors import InvalidArgument
from graftml.types import ModelSpec, Prediction

_UNDER_WAY = 4
"""Calls: while one is answered, the next is on its way and another is read."""

_CALL_BYTES = 8 * 2**20
"""Of images in one call: on their way they are held some three times."""

Answer = tuple[str, tuple[Prediction, ...]]
"""An image's path, and what each model says, or the error, the same of each."""


def answers(
    client: Client,
    models: list[ModelSpec],
    images: Iterable[ImageFile],
    *,
    top_k: int,
    include_features: bool,
) -> Iterator[Answer]:
    """Yields the answers in the images' order; raises what a whole call failed with."""
    under_way: deque[Future[list[Answer]]] = deque()

    def ask(batch: list[tuple[str, bytes | InvalidArgument]]) -> list[Answer]:
        sent = [data for _, data in batch if isinstance(data, bytes)]
        by_model = (
            client.predict_many(sent, models, top_k=top_k, include_features=include_features)
            if sent
            else []
        )
        found = zip(*by_model, strict=True)
        return [
            (
                path,
                next(found)
                if isinstance(data, bytes)
                else tuple(Prediction(model.model, None, error=data) for model in models),
            )
            for path, data in batch
        ]

    pool = ThreadPoolExecutor(_UNDER_WAY)
    try:
        for batch in _batches(images):
            under_way.append(pool.submit(ask, batch))
            if len(under_way) == _UNDER_WAY:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    finally:
        # Calls that are still under way end with the client's connection.
        pool.shutdown(wait=False, cancel_futures=True)


def _batches(images: Iterable[ImageFile]) -> Iterator[list[tuple[str, bytes | InvalidArgument]]]:
    batch: list[tuple[str, bytes | InvalidArgument]] = []
    size = 0
    for image in images:
        data = image.read()
        batch.append((image.path, data))
        size += len(data) if isinstance(data, bytes) else 0
        if len(batch) == IMAGES_A_REQUEST or size > _CALL_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
