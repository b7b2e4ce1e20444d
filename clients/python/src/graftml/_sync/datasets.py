# Generated from graftml/_async by clients/generate_sync.py: edit that, and `make generate`.
"""The client's methods for datasets."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from graftml_stubs.v1 import dataset_pb2 as pb

from graftml import _answers, _uploads
from graftml import _sync_io as io
from graftml._channel import TRANSFER_TIMEOUT_S
from graftml._data import Unlabelled, Uploadable
from graftml._encoding import message
from graftml._sync.transport import Transport
from graftml._uploads import OnProgress, Upload
from graftml.types import Dataset, DatasetImage, Erasure, ServerPath

_MOST_IMAGES = 1000
"""Of a page: a dataset has very many."""


class Datasets:
    """Keeps and changes datasets."""

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
        upload = io.blocking(
            _uploads.prepare,
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
        upload = io.blocking(
            _uploads.more, dataset, data, display_name, on_progress, is_unlabelled=is_unlabelled
        )
        return self._upload(upload, timeout_s)

    def remove_images(
        self, dataset: Dataset | str, digests: Iterable[str], *, display_name: str = ""
    ) -> Dataset:
        """Makes another dataset of a dataset's images without those of some digests."""
        request = message(
            pb.RemoveImagesRequest,
            dataset_id=_uploads.id_of(dataset),
            digests=digests,
            display_name=display_name,
        )
        answer = self._transport.unary(self._transport.datasets.RemoveImages, request)
        return _answers.dataset(answer.dataset)

    def relabel_images(
        self, dataset: Dataset | str, labels: Mapping[str, str], *, display_name: str = ""
    ) -> Dataset:
        """Makes another dataset of a dataset's images; `labels` maps digests to their classes."""
        request = message(
            pb.RelabelImagesRequest,
            dataset_id=_uploads.id_of(dataset),
            labels=labels,
            display_name=display_name,
        )
        answer = self._transport.unary(self._transport.datasets.RelabelImages, request)
        return _answers.dataset(answer.dataset)

    def list_images(self, dataset: Dataset | str) -> Iterator[DatasetImage]:
        """Iterates over the images of a dataset, by split, class and name."""
        dataset_id = _uploads.id_of(dataset)
        return self._transport.pages(
            self._transport.datasets.ListImages,
            message(pb.ListImagesRequest, dataset_id=dataset_id, page_size=_MOST_IMAGES),
            lambda answer: map(_answers.dataset_image, answer.images),
        )

    def erase_image(self, digest: str) -> Erasure:
        """Erases an image from every dataset that has it; see the proto's EraseImage.

        Returns what had it: datasets keep their ids, and versions of models stay as they are.
        """
        request = message(pb.EraseImageRequest, image_digest=digest)
        answer = self._transport.unary(self._transport.datasets.EraseImage, request)
        return _answers.erasure(answer)

    def get_dataset(self, dataset_id: str) -> Dataset:
        """Describes one dataset."""
        request = message(pb.GetDatasetRequest, dataset_id=dataset_id)
        answer = self._transport.unary(self._transport.datasets.GetDataset, request)
        return _answers.dataset(answer.dataset)

    def list_datasets(self) -> Iterator[Dataset]:
        """Iterates over the datasets, newest first."""
        return self._transport.pages(
            self._transport.datasets.ListDatasets,
            pb.ListDatasetsRequest(),
            lambda answer: map(_answers.dataset, answer.datasets),
        )

    def delete_dataset(self, dataset_id: str) -> None:
        """Deletes a dataset, and the images that no other one has."""
        request = message(pb.DeleteDatasetRequest, dataset_id=dataset_id)
        self._transport.unary(self._transport.datasets.DeleteDataset, request)

    def _sent(self, source: str | ServerPath | Upload) -> str | ServerPath:
        """Returns where the images are on the server, after their upload where there is one."""
        if isinstance(source, Upload):
            stored = self._upload(source, TRANSFER_TIMEOUT_S)
            return stored.dataset_id
        return source

    def _upload(self, upload: Upload, timeout_s: float) -> Dataset:
        calls = self._transport.datasets
        invoke: Any = calls.AddImages if upload.is_addition else calls.UploadDataset

        def send(left_s: float) -> Dataset:
            answer = self._transport.collect(invoke, upload.messages(), left_s)
            return _answers.dataset(answer.dataset)

        return self._transport.attempts(send, timeout_s, is_safe=upload.is_repeatable)
