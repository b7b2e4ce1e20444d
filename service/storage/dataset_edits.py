"""Changes of datasets that bring no image: removing, relabelling, erasing; and their images' list.

The first two make another dataset of one, with an index of its own on the same packs; erasing
changes all datasets that have an image, which keep their ids. Every method blocks, and may be
called from any thread.
"""

import re
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from service.errors import bad_field, stopping
from service.ingest import edits
from service.ingest import index as indexes
from service.ingest.edits import Edited
from service.ingest.index import IndexedImage
from service.ingest.names import shown
from service.storage import dataset_rows, pagination, version_rows
from service.storage.changes import Changes
from service.storage.database import Database
from service.storage.dataset_keeping import DatasetChanged, DatasetKeeper, made_of
from service.storage.dataset_rows import DatasetRecord
from service.storage.datasets import check_display_name

MAX_NAMED = 10_000
"""Limit on the images that one call removes or relabels."""
_TRIES = 5
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Erased:
    """What had an image that was erased."""

    dataset_ids: list[str]
    versions: list[tuple[str, int]]
    """Models with the numbers of versions that were trained on one of these while it had it."""


class DatasetEdits:
    """Changes datasets."""

    def __init__(
        self,
        database: Database,
        keeper: DatasetKeeper,
        changes: Changes,
        forget: Callable[[str, str], None],
    ) -> None:
        """`forget` drops what is kept of a tenant's image of a digest for jobs to come."""
        self._database = database
        self._keeper = keeper
        self._changes = changes
        self._forget = forget
        self._closing = threading.Event()

    def close(self) -> None:
        """Makes an erasure that is under way give up soon, with Unavailable."""
        self._closing.set()

    def _go_on(self) -> None:
        if self._closing.is_set():
            raise stopping("erase the image again soon")

    def remove(
        self,
        dataset_id: str,
        digests: Collection[str],
        tenant: str,
        *,
        display_name: str = "",
        max_stored_bytes: int | None = None,
    ) -> DatasetRecord:
        """Makes a dataset of another without some images; raises as `edits.removed`, OverQuota."""
        _check_named("digests", digests)
        edit = partial(edits.removed, digests=digests)
        return self._made(dataset_id, tenant, display_name, edit, max_stored_bytes)

    def relabel(
        self,
        dataset_id: str,
        labels: Mapping[str, str],
        tenant: str,
        *,
        display_name: str = "",
        max_stored_bytes: int | None = None,
    ) -> DatasetRecord:
        """Makes a dataset of another with images in other classes; raises as `edits.relabelled`.

        OverQuota, too.
        """
        _check_named("labels", labels)
        edit = partial(edits.relabelled, labels=labels)
        return self._made(dataset_id, tenant, display_name, edit, max_stored_bytes)

    def images(
        self, dataset_id: str, page_size: int, page_token: str, tenant: str
    ) -> tuple[list[IndexedImage], str]:
        """Returns a page of a dataset's images, and the token of the next ("" on the last).

        A token holds a place: an image that is erased keeps its own.
        """
        limit = pagination.size(page_size)
        kind = f"images of {dataset_id}"
        (start,) = pagination.key(kind, tenant, page_token, int) or (0,)
        with self._database.read() as connection:
            record = dataset_rows.find(connection, dataset_id, tenant)
        found: list[IndexedImage] = []
        with self._keeper.index_file(record) as path:
            for image in indexes.iterate(path, max(0, int(start))):
                if len(found) == limit:
                    return found, pagination.token(kind, tenant, int(start) + limit)
                found.append(image)
        return found, ""

    def erase(self, image_digest: str, tenant: str) -> Erased:
        """Erases an image from every dataset of a tenant, and what is kept of it for jobs to come.

        Doing it again changes nothing. Raises NotFound (IMAGE_NOT_FOUND), and Unavailable
        (STORAGE_BUSY) where other calls change its datasets all the while.
        """
        if not _DIGEST.fullmatch(image_digest):
            raise bad_field(
                "image_digest",
                f"{shown(image_digest)} is not a sha256: give 64 hexadecimal digits, in lower case",
            )
        records = self._keeper.erase(image_digest, tenant, self._go_on)
        self._forget(tenant, image_digest)
        # Also where it was erased before: it may have been classified since.
        with self._database.transaction(f"tenant:{tenant}") as connection:
            self._changes.note(connection, "image", tenant, image_digest)
        with self._database.read() as connection:
            erased = dataset_rows.erasures_of(connection, image_digest, tenant)
            versions = version_rows.trained_on(connection, tenant, erased)
        return Erased([record.dataset_id for record in records], versions)

    def _made(
        self,
        dataset_id: str,
        tenant: str,
        display_name: str,
        edit: Callable[[Path, Path], Edited],
        max_stored_bytes: int | None,
    ) -> DatasetRecord:
        check_display_name(display_name, "display_name")
        for _ in range(_TRIES):
            with self._database.read() as connection:
                base = dataset_rows.find(connection, dataset_id, tenant)
            with self._keeper.folder() as folder:
                target = folder / "index"
                with self._keeper.index_file(base) as index_file:
                    edited = edit(index_file, target)
                try:
                    return self._keeper.keep(
                        made_of(edited, target),
                        tenant,
                        display_name or base.display_name,
                        base=base,
                        renews=False,
                        max_stored_bytes=max_stored_bytes,
                    )
                except DatasetChanged:
                    continue
        raise DatasetChanged


def _check_named(field: str, named: Collection[str]) -> None:
    if not 1 <= len(named) <= MAX_NAMED:
        raise bad_field(
            field, f"{field} names {len(named)} images: name 1 to {MAX_NAMED} in a call"
        )
