"""Every kind of file, folder and label, by every way in: the table of docs/reference/data.md."""

import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from graftml import _uploads

from service.domain import DEFAULT_TENANT, ReadSummary
from service.errors import GraftError
from service.ingest import index, reader
from service.ingest.archives import Limits
from service.rpc.datasets import _take
from service.storage.database import Database
from service.storage.dataset_keeping import DatasetKeeper
from service.storage.datasets import DatasetStore
from tests.unit.ingest.kinds import KINDS, Kind, Pairs, base, base_pairs
from tests.unit.storage.conftest import QUOTAS, FakeReader, make_blobs

DOCUMENT = Path(__file__).parents[3] / "docs" / "reference" / "data.md"
BEGIN, END = "<!-- table: made by a test -->\n", "<!-- end of the table -->\n"
LIMITS = Limits(max_upload_bytes=2**24, max_unpacked_bytes=2**24, max_files=1000)


def by_client(store: DatasetStore, data: Path | Pairs, **_: Path) -> ReadSummary:
    upload = store.begin_upload("", "", tenant=DEFAULT_TENANT)
    try:
        for message in _uploads.prepare(data, "", None).messages():
            if message.WhichOneof("part") in ("archive_chunk", "image"):
                _take(upload, message)
        return upload.finish().summary
    finally:
        upload.abort()


def by_tar(store: DatasetStore, data: Path, work: Path) -> ReadSummary:
    archive = work / "archive.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(data, arcname=".")
    return store.import_archive(archive, tenant=DEFAULT_TENANT).summary


def by_zip(store: DatasetStore, data: Path, work: Path) -> ReadSummary:
    archive = work / "archive.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(data.rglob("*")):
            info = zipfile.ZipInfo(path.relative_to(data).as_posix() + "/" * _is_folder(path))
            info.external_attr = path.lstat().st_mode << 16
            packed.writestr(info, path.read_bytes() if path.is_file() else b"")
    return store.import_archive(archive, tenant=DEFAULT_TENANT).summary


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def by_server_folder(store: DatasetStore, data: Path, work: Path) -> ReadSummary:
    source = store.read_folder(data, work / "read", tenant=DEFAULT_TENANT)
    return index.load(Path(source.index_file)).summary


WAYS: dict[str, Callable[..., ReadSummary]] = {
    "client": by_client, "tar": by_tar, "zip": by_zip, "server": by_server_folder,
}  # fmt: skip


def outcome(work: Path, data: Path | Pairs, way: Callable[..., ReadSummary]) -> str:
    """Says what became of a dataset, in the words of the table."""
    work.mkdir()
    database = Database(work / "data")
    try:
        keeper = DatasetKeeper(
            database, make_blobs(database, work / "data"), QUOTAS, work / "uploads"
        )
        store = DatasetStore(database, keeper, FakeReader(reader.inspect_here, 1), LIMITS, QUOTAS)
        summary = way(store, data, work=work)
    except GraftError as error:
        return f"refused: {error.message}"
    finally:
        database.close()
    counts: Counter[str] = Counter()
    for row in summary.left_out:
        counts[row.reason.replace("_", " ")] += row.count
    told = [f"{count} {reason}" for reason, count in counts.items()]
    text = f"{summary.used} used"
    if summary.nested:
        text += f", {summary.nested} of them from folders below their class"
    return text + (f"; left out: {', '.join(told)}" if told else "")


def folder_outcomes(kind: Kind, work: Path) -> dict[str, str]:
    """Says what becomes of a kind by each way in that brings folders."""
    data = work / "folder"
    data.mkdir()
    if not kind.replaces:
        base(data)
    kind.lay(data)
    return {name: outcome(work / name, data, way) for name, way in WAYS.items()}


def pairs_outcome(kind: Kind, work: Path) -> str:
    """Says what becomes of a kind as pairs of a label and an image."""
    if kind.pairs is None:
        return "cannot be said"
    return outcome(work / "pairs", base_pairs() + kind.pairs(), by_client)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, str], str]]:
    """Returns what became of each kind, by the ways that bring folders and as pairs."""
    found = {}
    for kind in KINDS:
        work = tmp_path_factory.mktemp("kind")
        found[kind.name] = folder_outcomes(kind, work), pairs_outcome(kind, work)
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_fares_alike_by_every_way_in(
    kind: Kind, outcomes: dict[str, tuple[dict[str, str], str]]
) -> None:
    by_folder, by_pairs = outcomes[kind.name]
    assert set(by_folder.values()) == {by_folder["client"]}
    is_refused = {text.startswith("refused") for text in (by_folder["client"], by_pairs)}
    assert kind.pairs is None or len(is_refused) == 1


def test_the_document_has_what_happens(outcomes: dict[str, tuple[dict[str, str], str]]) -> None:
    table = ["| What is sent | As a folder or an archive | As pairs |", "| --- | --- | --- |"]
    for name, (by_folder, by_pairs) in outcomes.items():
        told = [_short(by_folder["client"]), _short(by_pairs)]
        table.append(f"| {name} | {told[0]} | {'the same' if told[0] == told[1] else told[1]} |")
    before, rest = DOCUMENT.read_text().split(BEGIN)
    written, after = rest.split(END)
    made = "\n".join([*table, ""])
    if os.environ.get("GRAFT_WRITE_DOCS"):
        DOCUMENT.write_text(f"{before}{BEGIN}{made}{END}{after}")
    assert written == made, "run this test with GRAFT_WRITE_DOCS=1, and read what changed"


def _short(text: str) -> str:
    """Cuts a message before the names and the remedy, for a table."""
    return re.split(r"; fix|: 'ants/|: put|: give|: rename|, since all| \(", text)[0]
