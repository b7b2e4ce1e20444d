"""The methods of both clients that keep and change datasets, side by side.

What is sent and how answers are read is `_calls`' and `_uploads`'.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

from graftml import _calls, _uploads
from graftml._async import AsyncTransport
from graftml._channel import TRANSFER_TIMEOUT_S
from graftml._sync import Transport
from graftml._uploads import OnProgress, Unlabelled, Upload, Uploadable
from graftml.types import Dataset, DatasetImage, Erasure, ServerPath


class DatasetMethods:
    """What `Client` has of them."""

    _transport: Transport

    def upload_dataset(
        self,
        data: Uploadable | Unlabelled,
        *,
        display_name: str = "",
        is_unlabelled: bool = False,
        case_sensitive_labels: bool = False,
        on_progress: OnProgress | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> Dataset:
        """Stores a folder, an archive or labelled images; the same ones get the same id.

        With `is_unlabelled` they have no classes, and are the target of a domain
        adaptation. With `case_sensitive_labels`, class names that differ in upper and
        lower case alone are two classes. The `summary` of the answer says which files were
        left out, and why.
        """
        upload = _uploads.prepare(
            data,
            display_name,
            on_progress,
            is_unlabelled=is_unlabelled,
            case_sensitive_labels=case_sensitive_labels,
        )
        return self._upload(upload, timeout_s)

    def add_images(
        self,
        dataset: Dataset | str,
        data: Uploadable | Unlabelled,
        *,
        display_name: str = "",
        is_unlabelled: bool = False,
        on_progress: OnProgress | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> Dataset:
        """Makes another dataset of a dataset's images and of more, which alone are sent.

        `data` is as for `upload_dataset`; `is_unlabelled` says that the dataset is, where its id
        is given. The `summary` of the answer says what was left out of `data`, and why.
        """
        upload = _uploads.more(
            dataset, data, display_name, on_progress, is_unlabelled=is_unlabelled
        )
        return self._upload(upload, timeout_s)

    def remove_images(
        self, dataset: Dataset | str, digests: Iterable[str], *, display_name: str = ""
    ) -> Dataset:
        """Makes another dataset of a dataset's images without those of some digests."""
        return self._transport.unary(_calls.remove_images(dataset, digests, display_name))

    def relabel_images(
        self, dataset: Dataset | str, labels: Mapping[str, str], *, display_name: str = ""
    ) -> Dataset:
        """Makes another dataset of a dataset's images; `labels` maps digests to their classes."""
        return self._transport.unary(_calls.relabel_images(dataset, labels, display_name))

    def list_images(self, dataset: Dataset | str) -> Iterator[DatasetImage]:
        """Iterates over the images of a dataset, by split, class and name."""
        return self._transport.pages(lambda token: _calls.list_images(dataset, token))

    def erase_image(self, digest: str) -> Erasure:
        """Erases an image from every dataset that has it; see the proto's EraseImage.

        Returns what had it: datasets keep their ids, and versions of models stay as they are.
        """
        return self._transport.unary(_calls.erase_image(digest))

    def get_dataset(self, dataset_id: str) -> Dataset:
        """Describes one dataset."""
        return self._transport.unary(_calls.get_dataset(dataset_id))

    def list_datasets(self) -> Iterator[Dataset]:
        """Datasets, newest first."""
        return self._transport.pages(_calls.list_datasets)

    def delete_dataset(self, dataset_id: str) -> None:
        """Deletes a dataset, and the images that no other one has."""
        self._transport.unary(_calls.delete_dataset(dataset_id))

    def _sent(self, source: str | ServerPath | Upload) -> str | ServerPath:
        """Where the images are on the server, after their upload where there is one."""
        if isinstance(source, Upload):
            return self._upload(source, TRANSFER_TIMEOUT_S).dataset_id
        return source

    def _upload(self, upload: Upload, timeout_s: float) -> Dataset:
        def send(left_s: float) -> Dataset:
            answer = self._transport.collect(upload.rpc, upload.messages(), left_s)
            return _uploads.stored_as(answer)

        return self._transport.attempts(send, timeout_s, is_safe=upload.is_repeatable)


class AsyncDatasetMethods:
    """What `AsyncClient` has of them: as `DatasetMethods`, with `await`."""

    _transport: AsyncTransport

    async def upload_dataset(
        self,
        data: Uploadable | Unlabelled,
        *,
        display_name: str = "",
        is_unlabelled: bool = False,
        case_sensitive_labels: bool = False,
        on_progress: OnProgress | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> Dataset:
        """As `Client.upload_dataset`; an iterable is read on a worker thread."""
        upload = await asyncio.to_thread(
            _uploads.prepare,
            data,
            display_name,
            on_progress,
            is_unlabelled=is_unlabelled,
            case_sensitive_labels=case_sensitive_labels,
        )
        return await self._upload(upload, timeout_s)

    async def add_images(
        self,
        dataset: Dataset | str,
        data: Uploadable | Unlabelled,
        *,
        display_name: str = "",
        is_unlabelled: bool = False,
        on_progress: OnProgress | None = None,
        timeout_s: float = TRANSFER_TIMEOUT_S,
    ) -> Dataset:
        """As `Client.add_images`; an iterable is read on a worker thread."""
        upload = await asyncio.to_thread(
            _uploads.more, dataset, data, display_name, on_progress, is_unlabelled=is_unlabelled
        )
        return await self._upload(upload, timeout_s)

    async def remove_images(
        self, dataset: Dataset | str, digests: Iterable[str], *, display_name: str = ""
    ) -> Dataset:
        """As `Client.remove_images`."""
        return await self._transport.unary(_calls.remove_images(dataset, digests, display_name))

    async def relabel_images(
        self, dataset: Dataset | str, labels: Mapping[str, str], *, display_name: str = ""
    ) -> Dataset:
        """As `Client.relabel_images`."""
        return await self._transport.unary(_calls.relabel_images(dataset, labels, display_name))

    def list_images(self, dataset: Dataset | str) -> AsyncIterator[DatasetImage]:
        """As `Client.list_images`."""
        return self._transport.pages(lambda token: _calls.list_images(dataset, token))

    async def erase_image(self, digest: str) -> Erasure:
        """As `Client.erase_image`."""
        return await self._transport.unary(_calls.erase_image(digest))

    async def get_dataset(self, dataset_id: str) -> Dataset:
        """As `Client.get_dataset`."""
        return await self._transport.unary(_calls.get_dataset(dataset_id))

    def list_datasets(self) -> AsyncIterator[Dataset]:
        """As `Client.list_datasets`."""
        return self._transport.pages(_calls.list_datasets)

    async def delete_dataset(self, dataset_id: str) -> None:
        """As `Client.delete_dataset`."""
        await self._transport.unary(_calls.delete_dataset(dataset_id))

    async def _sent(self, source: str | ServerPath | Upload) -> str | ServerPath:
        """As `Client._sent`."""
        if isinstance(source, Upload):
            return (await self._upload(source, TRANSFER_TIMEOUT_S)).dataset_id
        return source

    async def _upload(self, upload: Upload, timeout_s: float) -> Dataset:
        async def send(left_s: float) -> Dataset:
            answer = await self._transport.collect(upload.rpc, upload.messages(), left_s)
            return _uploads.stored_as(answer)

        return await self._transport.attempts(send, timeout_s, is_safe=upload.is_repeatable)
