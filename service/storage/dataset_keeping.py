"""Keeps datasets: their index and their packs become blobs, then a row names these.

A dataset is an ordered index of images with an id of its own; packs are only where their bytes
lie, and several datasets may share one. What was made is known again by its images: the same
ones give the dataset that is there, with the names and the summary of their newest upload. An
image that was erased from a dataset stays erased when the others are sent again. Every method
may be called from any thread, and blocks.
"""

import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from service.domain import LeftOutFile, LeftOutReason
from service.errors import NotFound, Reason, Unavailable, unloadable
from service.ingest import edits, packs
from service.ingest import index as indexes
from service.ingest.edits import Edited, Repacked
from service.ingest.index import Index
from service.ingest.names import shown
from service.ops import failpoints
from service.storage import dataset_rows, fsync, version_rows
from service.storage.blobs import Blob, BlobGone, Blobs
from service.storage.database import Connection, Database, now_s
from service.storage.dataset_rows import DatasetRecord
from service.storage.quotas import Quotas, check_room

INDEX = "index of the dataset"
PACK = "file with the images of the dataset"
"""What errors call these blobs."""
_TRIES = 5
"""How often something is made anew because another call changed what it was made of."""


class DatasetChanged(Unavailable):
    """What something was made of has changed meanwhile."""

    def __init__(self) -> None:
        super().__init__(
            Reason.STORAGE_BUSY,
            "the dataset was changed by another call meanwhile: try again",
            retry_after_s=1.0,
        )


@dataclass(frozen=True)
class Made:
    """A dataset that is to be kept, as files of this machine."""

    index: Index
    """Without its images."""
    index_file: Path
    index_digest: str
    new_packs: Mapping[str, Path]
    """Those of its packs that came with it, by their sha256; the others are stored."""


class DatasetKeeper:
    """Stores datasets, and erases images from them."""

    def __init__(self, database: Database, blobs: Blobs, quotas: Quotas, work: Path) -> None:
        """Works in folders of its own below `work`; those that an earlier process left go."""
        self._database = database
        self._blobs = blobs
        self._quotas = quotas
        fsync.make_folder(work)
        # The reader opens what lies below real paths alone.
        self._work = work.resolve()
        for left in self._work.iterdir():
            shutil.rmtree(left, ignore_errors=True)

    def new_folder(self) -> Path:
        """Makes a folder to work in, whose maker deletes it; raises Exhausted (STORAGE_FULL)."""
        folder = self._work / secrets.token_hex(8)
        with fsync.full_disk_told():
            folder.mkdir()
        return folder

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yields a folder to work in, deleted at the end."""
        folder = self.new_folder()
        try:
            with fsync.full_disk_told():
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def index_file(self, record: DatasetRecord) -> Iterator[Path]:
        """Yields the file of a dataset's index; raises Damaged for one that cannot be read."""
        with self._blobs.files([record.index_digest], INDEX) as files:
            try:
                yield files[record.index_digest]
            except msgspec.DecodeError as error:
                raise unloadable(INDEX, f"is damaged ({error})") from error

    def keep(
        self,
        made: Made,
        tenant: str,
        display_name: str,
        *,
        base: DatasetRecord | None = None,
        renews: bool = True,
        max_stored_bytes: int | None = None,
    ) -> DatasetRecord:
        """Stores what was made, of `base` where there is one, and returns its dataset.

        One of the same images gets the new index, unless not `renews`. Raises DatasetChanged when
        `base` is another one meanwhile, OverQuota (stored_bytes), or Exhausted (STORAGE_FULL).
        """
        with ExitStack() as working:
            for _ in range(_TRIES):
                with self._database.read() as connection:
                    known = dataset_rows.find_digest(connection, made.index.digest, tenant)
                if known is not None and not renews:
                    return known
                fitted = made
                if known is not None and known.erased_count:
                    fitted = self._without_erased(made, known, working.enter_context(self.folder()))
                blobs = self._put([fitted], fitted.new_packs)
                try:
                    with self._database.transaction(f"tenant:{tenant}") as connection:
                        now = dataset_rows.find_digest(connection, made.index.digest, tenant)
                        if _index_of(now) != _index_of(known):
                            continue
                        if base is not None:
                            there = dataset_rows.find_digest(connection, base.digest, tenant)
                            if _index_of(there) != base.index_digest:
                                raise DatasetChanged
                        record = _record_of(fitted, tenant, display_name, now)
                        self._blobs.reference(connection, blobs)
                        self._write(connection, fitted, record, now, max_stored_bytes)
                except BlobGone:
                    continue
                failpoints.reach("dataset.kept")
                return record
        raise DatasetChanged

    def _write(
        self,
        connection: Connection,
        made: Made,
        record: DatasetRecord,
        known: DatasetRecord | None,
        max_stored_bytes: int | None,
    ) -> None:
        if known is not None:
            dataset_rows.update(connection, record, made.index.packs)
            return
        used = self._quotas.stored_bytes(connection, record.tenant)
        dataset_rows.insert(connection, record, made.index.packs)
        brings = self._quotas.stored_bytes(connection, record.tenant) - used
        check_room(used, brings, max_stored_bytes)

    def erase(
        self, image_digest: str, tenant: str, go_on: Callable[[], None]
    ) -> list[DatasetRecord]:
        """Erases an image from every dataset of a tenant that has it, and returns these.

        Those from which it was erased before are among them. Of each pack that holds its bytes a
        new one is written, of which all datasets that share it get a new index; no row names the
        old one then. `go_on` is called often and may raise to stop. Raises NotFound
        (IMAGE_NOT_FOUND), DatasetChanged, or Exhausted (STORAGE_FULL).
        """
        for _ in range(_TRIES):
            is_live, erased = self._having(image_digest, tenant, go_on)
            holding = self._holding(image_digest, tenant, go_on)
            if not (is_live or erased or holding):
                raise NotFound(
                    Reason.IMAGE_NOT_FOUND,
                    f"no dataset has an image of the digest {shown(image_digest)}: name one that "
                    "the list of a dataset's images shows",
                )
            if not holding:
                return erased
            with ExitStack() as used, suppress(DatasetChanged):
                return [*self._erase(image_digest, holding, tenant, go_on, used), *erased]
        raise DatasetChanged

    def _erase(
        self,
        image_digest: str,
        holding: Collection[str],
        tenant: str,
        go_on: Callable[[], None],
        used: ExitStack,
    ) -> list[DatasetRecord]:
        """Erases an image from packs and from all that share them; returns those that had it."""
        gone = {image_digest}
        with self._database.read() as connection:
            sharing = dataset_rows.sharing(connection, holding, tenant)
            # One that another erasure has just written anew would keep the image.
            if not set(holding) <= set(dataset_rows.all_packs(connection, tenant)):
                raise DatasetChanged
        folder = used.enter_context(self.folder())
        files = used.enter_context(self._blobs.files(holding, PACK))
        repacked, new_packs = _repack(files, folder, gone, go_on)
        made = []
        for record in sharing:
            go_on()
            target = folder / record.dataset_id
            with self.index_file(record) as index_file:
                made.append(made_of(edits.erased(index_file, target, gone, repacked), target))
        blobs = self._put(made, new_packs)
        now = []
        try:
            with self._database.transaction(f"tenant:{tenant}") as connection:
                # Neither has one of them changed, nor does another share the packs by now.
                if dataset_rows.sharing(connection, holding, tenant) != sharing:
                    raise DatasetChanged
                self._blobs.reference(connection, blobs)
                for record, each in zip(sharing, made, strict=True):
                    now.append(_renewed(record, each))
                    dataset_rows.update(connection, now[-1], each.index.packs)
                had = [
                    record
                    for record, before in zip(now, sharing, strict=True)
                    if record.erased_count > before.erased_count
                ]
                dataset_rows.note_erased(connection, had, image_digest, now_s(connection))
                version_rows.mark_erased(connection, tenant, {r.dataset_id for r in had})
        except BlobGone as error:
            raise DatasetChanged from error
        failpoints.reach("dataset.erased")
        return had

    def _having(
        self, image_digest: str, tenant: str, go_on: Callable[[], None]
    ) -> tuple[bool, list[DatasetRecord]]:
        """Tells whether a dataset has an image; returns those that it was erased from, too."""
        with self._database.read() as connection:
            records = dataset_rows.all_of(connection, tenant)
        is_live, erased = False, []
        for record in records:
            go_on()
            with self.index_file(record) as path:
                if not indexes.mentions(path, image_digest):
                    continue
                for image in indexes.iterate(path):
                    if image.digest == image_digest and image.is_erased:
                        erased.append(record)
                    elif image.digest == image_digest:
                        is_live = True
        return is_live, erased

    def _holding(self, image_digest: str, tenant: str, go_on: Callable[[], None]) -> list[str]:
        """Returns the packs that hold the bytes of an image, also where no index names it."""
        with self._database.read() as connection:
            digests = dataset_rows.all_packs(connection, tenant)
        found = []
        for digest in digests:
            with self._blobs.files([digest], PACK) as files, _readable_pack():
                for name, _ in packs.members(files[digest]):
                    go_on()
                    if name == image_digest:
                        found.append(digest)
                        break
        return found

    def _without_erased(self, made: Made, known: DatasetRecord, folder: Path) -> Made:
        """Returns what was made without the images that were erased from the dataset before."""
        with self.index_file(known) as path:
            gone = {image.digest for image in indexes.iterate(path) if image.is_erased}
        again = [image for image in indexes.iterate(made.index_file) if image.digest in gone]
        here = [image for image in again if not image.is_erased]
        old = {image.pack for image in here} - made.new_packs.keys()
        with self._blobs.files(old, PACK) as files:
            holding = {image.pack: files.get(image.pack) for image in here}
            paths = {key: made.new_packs.get(key) or path for key, path in holding.items()}
            repacked, new_packs = _repack(
                {key: path for key, path in paths.items() if path}, folder, gone, lambda: None
            )
        rows = [
            LeftOutFile(
                image.name, image.label, LeftOutReason.ERASED,
                "the image was erased from the dataset",
            )
            for image in here
        ]  # fmt: skip
        summary = indexes.without(made.index.summary, rows)
        target = folder / "index"
        edited = edits.erased(made.index_file, target, gone, repacked, summary)
        kept = {key: path for key, path in made.new_packs.items() if key not in repacked}
        return Made(edited.index, target, edited.digest, {**kept, **new_packs})

    def _put(self, made: Iterable[Made], new_packs: Mapping[str, Path]) -> list[Blob]:
        """Puts the files of datasets; returns all blobs that they name."""
        made = list(made)
        files = [(path, digest) for digest, path in new_packs.items()]
        blobs = self._blobs.put_all(
            [*files, *((each.index_file, each.index_digest) for each in made)]
        )
        for digest in {digest for each in made for digest in each.index.packs} - new_packs.keys():
            if (known := self._blobs.find(digest)) is None:
                raise unloadable(PACK, "is missing")
            blobs.append(known)
        failpoints.reach("dataset.files_put")
        return blobs


def made_of(edited: Edited, index_file: Path) -> Made:
    """Returns what an edit wrote, which brings no pack."""
    return Made(edited.index, index_file, edited.digest, {})


def _repack(
    files: Mapping[str, Path], folder: Path, gone: Collection[str], go_on: Callable[[], None]
) -> tuple[dict[str, Repacked], dict[str, Path]]:
    """Writes packs again without some images; returns them by the old ones, and their files."""
    repacked, new = {}, {}
    for digest, path in files.items():
        target = folder / f"{digest}.tar"
        with _readable_pack():
            again = Repacked(*packs.without(path, target, gone, go_on))
        repacked[digest] = again
        # One that is empty now is named by no index.
        if again.offsets:
            new[again.digest] = target
    return repacked, new


@contextmanager
def _readable_pack() -> Iterator[None]:
    """Raises Damaged for a pack that is none."""
    try:
        yield
    except ValueError as error:
        raise unloadable(PACK, f"is damaged ({error})") from error


def _record_of(
    made: Made, tenant: str, display_name: str, known: DatasetRecord | None
) -> DatasetRecord:
    index = made.index
    if known is not None:
        now = _renewed(known, made)
        return replace(
            now,
            display_name=display_name or known.display_name,
            case_sensitive=known.case_sensitive or index.case_sensitive,
        )
    return DatasetRecord(
        dataset_id=dataset_rows.id_of(tenant, index.digest),
        tenant=tenant,
        display_name=display_name,
        digest=index.digest,
        create_time_s=time.time(),
        size_bytes=index.size_bytes,
        classes=index.classes,
        image_count=index.summary.used,
        summary=index.summary,
        is_unlabelled=not index.is_labelled,
        index_digest=made.index_digest,
        case_sensitive=index.case_sensitive,
        erased_count=index.erased_count,
    )


def _renewed(record: DatasetRecord, made: Made) -> DatasetRecord:
    index = made.index
    return replace(
        record,
        size_bytes=index.size_bytes,
        classes=index.classes,
        image_count=index.summary.used,
        summary=index.summary,
        index_digest=made.index_digest,
        erased_count=index.erased_count,
    )


def _index_of(record: DatasetRecord | None) -> str:
    return "" if record is None else record.index_digest
