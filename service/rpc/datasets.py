"""DatasetService: images, kept for fine-tuning."""

import asyncio
from collections.abc import AsyncIterator

from graftml_stubs.v1 import dataset_pb2 as pb
from graftml_stubs.v1 import dataset_pb2_grpc

from service.auth import principal
from service.errors import bad_field
from service.jobs.uninterrupted import in_long_thread
from service.rpc import uploads
from service.rpc.codec import datasets as codec
from service.rpc.handlers import Context, in_store_thread
from service.storage.dataset_edits import DatasetEdits
from service.storage.datasets import DatasetStore
from service.storage.uploads import Upload


class DatasetServicer(dataset_pb2_grpc.DatasetServiceServicer):
    """Stores images for fine-tuning, as dataset.proto says."""

    def __init__(self, datasets: DatasetStore, edits: DatasetEdits, idle_timeout_s: float) -> None:
        self._datasets = datasets
        self._edits = edits
        self._idle_timeout_s = idle_timeout_s

    async def UploadDataset(
        self, request_iterator: AsyncIterator[pb.UploadDatasetRequest], context: Context
    ) -> pb.UploadDatasetResponse:
        record = await uploads.received(
            request_iterator, "header", self._begin, _take, self._idle_timeout_s
        )
        return pb.UploadDatasetResponse(dataset=await asyncio.to_thread(codec.dataset, record))

    def _begin(self, header: pb.UploadDatasetHeader) -> Upload:
        return self._datasets.begin_upload(
            header.display_name,
            codec.archive_format(header.format),
            is_unlabelled=header.is_unlabelled,
            case_sensitive=header.case_sensitive_labels,
            tenant=principal.current().tenant,
            max_stored_bytes=principal.current().quota.stored_bytes,
        )

    @in_store_thread
    def GetDataset(self, request: pb.GetDatasetRequest, context: Context) -> pb.GetDatasetResponse:
        record = self._datasets.get(request.dataset_id, principal.current().tenant)
        return pb.GetDatasetResponse(dataset=codec.dataset(record))

    @in_store_thread
    def ListDatasets(
        self, request: pb.ListDatasetsRequest, context: Context
    ) -> pb.ListDatasetsResponse:
        records, token = self._datasets.list(
            request.page_size, request.page_token, principal.current().tenant
        )
        return pb.ListDatasetsResponse(datasets=map(codec.dataset, records), next_page_token=token)

    @in_store_thread
    def DeleteDataset(
        self, request: pb.DeleteDatasetRequest, context: Context
    ) -> pb.DeleteDatasetResponse:
        self._datasets.delete(request.dataset_id, principal.current().tenant)
        return pb.DeleteDatasetResponse()

    async def AddImages(
        self, request_iterator: AsyncIterator[pb.AddImagesRequest], context: Context
    ) -> pb.AddImagesResponse:
        record = await uploads.received(
            request_iterator, "header", self._begin_adding, _take, self._idle_timeout_s
        )
        return pb.AddImagesResponse(dataset=await asyncio.to_thread(codec.dataset, record))

    def _begin_adding(self, header: pb.AddImagesHeader) -> Upload:
        return self._datasets.begin_adding(
            header.dataset_id,
            header.display_name,
            codec.archive_format(header.format),
            tenant=principal.current().tenant,
            max_stored_bytes=principal.current().quota.stored_bytes,
        )

    @in_store_thread
    def RemoveImages(
        self, request: pb.RemoveImagesRequest, context: Context
    ) -> pb.RemoveImagesResponse:
        record = self._edits.remove(
            request.dataset_id,
            request.digests,
            principal.current().tenant,
            display_name=request.display_name,
            max_stored_bytes=principal.current().quota.stored_bytes,
        )
        return pb.RemoveImagesResponse(dataset=codec.dataset(record))

    @in_store_thread
    def RelabelImages(
        self, request: pb.RelabelImagesRequest, context: Context
    ) -> pb.RelabelImagesResponse:
        record = self._edits.relabel(
            request.dataset_id,
            request.labels,
            principal.current().tenant,
            display_name=request.display_name,
            max_stored_bytes=principal.current().quota.stored_bytes,
        )
        return pb.RelabelImagesResponse(dataset=codec.dataset(record))

    @in_store_thread
    def ListImages(self, request: pb.ListImagesRequest, context: Context) -> pb.ListImagesResponse:
        images, token = self._edits.images(
            request.dataset_id, request.page_size, request.page_token, principal.current().tenant
        )
        return pb.ListImagesResponse(images=map(codec.image, images), next_page_token=token)

    async def EraseImage(
        self, request: pb.EraseImageRequest, context: Context
    ) -> pb.EraseImageResponse:
        tenant = principal.current().tenant
        erased = await in_long_thread(self._edits.erase, request.image_digest, tenant)
        return pb.EraseImageResponse(
            dataset_ids=erased.dataset_ids,
            versions=[
                pb.AffectedVersion(model=model, version=version)
                for model, version in erased.versions
            ],
        )


def _take(upload: Upload, message: pb.UploadDatasetRequest | pb.AddImagesRequest) -> None:
    part = message.WhichOneof("part")
    if part == "archive_chunk":
        upload.write(message.archive_chunk)
    elif part == "image":
        add_image(upload, message.image, "image")
    else:
        raise bad_field("part", "a message holds neither `archive_chunk` nor `image`")


def add_image(upload: Upload, image: pb.LabelledImage, field: str) -> None:
    """Adds one image of a request; `field` names its place in errors."""
    if image.split not in codec.SPLITS:
        raise bad_field(
            f"{field}.split", f"{field}.split {image.split} is none: use a value of Split"
        )
    part = codec.SPLITS[image.split]
    upload.add_image(image.label, image.content, image.filename, part, image.group)
