"""DatasetService: images, kept for fine-tuning."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from graft.v1 import dataset_pb2 as pb
from graft.v1 import dataset_pb2_grpc
from grpc import aio

from service.errors import Expired, InvalidInput, Reason
from service.rpc import convert
from service.rpc.caller import caller
from service.storage.datasets import DatasetStore, Upload

_LEAST_BYTES = 2**20
"""What an upload must bring in each of its idle timeouts, on average, once the first is over."""

Context = aio.ServicerContext[Any, Any]


class DatasetServicer(dataset_pb2_grpc.DatasetServiceServicer):
    """Keeps images."""

    def __init__(self, datasets: DatasetStore, idle_timeout_s: float = 60.0) -> None:
        self._datasets = datasets
        self._idle_timeout_s = idle_timeout_s

    async def UploadDataset(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UploadDatasetRequest], context: Context
    ) -> pb.UploadDatasetResponse:
        """See dataset.proto. The next message is read when the one before is on disk."""
        started = asyncio.get_running_loop().time()
        first = await self._next(request_iterator, self._idle_timeout_s)
        if first is None or first.WhichOneof("part") != "header":
            raise _bad("the stream must begin with the header", "header")
        upload = await self._begin(first.header)
        try:
            count = taken_bytes = 0
            while True:
                # Else who sends a byte a minute holds an upload's place for ever.
                allowed_s = self._idle_timeout_s * (1 + taken_bytes / _LEAST_BYTES)
                left_s = started + allowed_s - asyncio.get_running_loop().time()
                message = await self._next(request_iterator, min(left_s, self._idle_timeout_s))
                if message is None or message.WhichOneof("part") == "end":
                    break
                await asyncio.to_thread(_take, upload, message)
                taken_bytes += message.ByteSize()
                count += 1
            if message is None or message.end.message_count != count:
                raise _bad(
                    f"the upload was cut off after {count} messages, without the `end` that tells "
                    "how many there are: send it again",
                    "end",
                )
            return pb.UploadDatasetResponse(
                dataset=convert.dataset(await asyncio.to_thread(upload.finish))
            )
        finally:
            # At once: a thread for the rest may have to be waited for.
            upload.abandon()
            await asyncio.shield(asyncio.to_thread(upload.abort))

    async def _begin(self, header: pb.UploadDatasetHeader) -> Upload:
        begin = asyncio.create_task(
            asyncio.to_thread(
                self._datasets.begin_upload,
                header.display_name,
                convert.archive_format(header.format),
                is_unlabelled=header.is_unlabelled,
                case_sensitive=header.case_sensitive_labels,
                tenant=caller().tenant,
                max_stored_bytes=caller().quota.stored_bytes,
            )
        )
        try:
            return await asyncio.shield(begin)
        except asyncio.CancelledError:
            # The thread goes on, and its folder would be left to nobody.
            upload = await begin
            await asyncio.shield(asyncio.to_thread(upload.abort))
            raise

    async def _next(
        self, messages: AsyncIterator[pb.UploadDatasetRequest], timeout_s: float
    ) -> pb.UploadDatasetRequest | None:
        try:
            async with asyncio.timeout(timeout_s):
                return await anext(messages, None)
        except TimeoutError:
            raise Expired(
                Reason.DEADLINE_EXCEEDED,
                f"the upload brought nothing for {self._idle_timeout_s:g} s, or less than "
                f"{_LEAST_BYTES // 2**20} MiB in each such time on average: send it again",
            ) from None

    async def GetDataset(  # noqa: N802
        self, request: pb.GetDatasetRequest, context: Context
    ) -> pb.GetDatasetResponse:
        """See dataset.proto."""
        record = await asyncio.to_thread(self._datasets.get, request.dataset_id, caller().tenant)
        return pb.GetDatasetResponse(dataset=convert.dataset(record))

    async def ListDatasets(  # noqa: N802
        self, request: pb.ListDatasetsRequest, context: Context
    ) -> pb.ListDatasetsResponse:
        """See dataset.proto."""
        records, token = await asyncio.to_thread(
            self._datasets.list, request.page_size, request.page_token, caller().tenant
        )
        return pb.ListDatasetsResponse(
            datasets=[convert.dataset(record) for record in records], next_page_token=token
        )

    async def DeleteDataset(  # noqa: N802
        self, request: pb.DeleteDatasetRequest, context: Context
    ) -> pb.DeleteDatasetResponse:
        """See dataset.proto."""
        await asyncio.to_thread(self._datasets.delete, request.dataset_id, caller().tenant)
        return pb.DeleteDatasetResponse()


def _take(upload: Upload, message: pb.UploadDatasetRequest) -> None:
    part = message.WhichOneof("part")
    if part == "archive_chunk":
        upload.write(message.archive_chunk)
    elif part == "image":
        add_image(upload, message.image, "image")
    elif part == "header":
        raise _bad("the header came twice: send it once, first", "header")
    else:
        raise _bad("a message holds neither `archive_chunk` nor `image`", "part")


def add_image(upload: Upload, image: pb.LabelledImage, field: str) -> None:
    """Adds one image of a request; `field` names its place in errors."""
    if image.split not in convert.SPLITS:
        raise _bad(f"{field}.split {image.split} is none: use a value of Split", f"{field}.split")
    part = convert.SPLITS[image.split]
    upload.add_image(image.label, image.content, image.filename, part, image.group)


def _bad(message: str, field: str) -> InvalidInput:
    return InvalidInput(Reason.INVALID_FIELD, message, field=field)
