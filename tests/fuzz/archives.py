"""Archives of every format, as they come and with their checksums fixed, to their classes."""

import gzip
import io
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec

from service.domain import LeftOutReason
from service.errors import GraftError
from service.ingest import layout
from service.ingest.archives import Limits, unpack
from service.ingest.layout import Entry, Kind, is_noise
from service.ingest.names import label_problem
from tests.fuzz.promise import Broken, Target

LIMITS = Limits(max_upload_bytes=2**20, max_unpacked_bytes=2**20, max_files=50)
_MEMORY = Path("/dev/shm")


@cache
def _ground() -> Path:
    """A folder of this process, in memory where the system has one."""
    where = _MEMORY if _MEMORY.is_dir() else None
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=where))


def run(data: bytes) -> None:
    """Unpacks and arranges; nothing may be written elsewhere, or more than is allowed."""
    fixed = with_checksums(data)
    if fixed != data:
        # Refused for its checksums most likely, which says nothing of the rest.
        with suppress(GraftError):
            _unpack(data)
        with suppress(GraftError):
            _unpack(gzip.compress(fixed, 1))
    _unpack(fixed)


def _unpack(data: bytes) -> None:
    ground = _ground()
    archive, into = ground / "archive", ground / "a" / "b" / "into"
    into.parent.mkdir(parents=True)
    archive.write_bytes(data)
    try:
        with archive.open("rb") as packed:
            entries = unpack(packed, into, "", LIMITS, lambda: None, lambda _: None)
        files = [entry.location for entry in entries if entry.location is not None]
        if any(at.path != into or at.offset + at.size > into.stat().st_size for at in files):
            raise Broken(f"files {files}, of {into.stat().st_size} bytes that were written")
        for is_labelled in (True, False):
            with suppress(GraftError):
                _arrange(entries, is_labelled=is_labelled)
    finally:
        written = {str(p.relative_to(ground)) for p in ground.rglob("*")}
        is_strange = into.is_symlink() or (into.exists() and not into.is_file())
        size = into.lstat().st_size if into.exists() else 0
        shutil.rmtree(ground)
        ground.mkdir()
        if not written <= {"archive", "a", "a/b", "a/b/into"}:
            raise Broken(f"written elsewhere: {sorted(written)}")
        if is_strange:
            raise Broken("it is not a plain file")
        if size > LIMITS.max_unpacked_bytes:
            raise Broken(f"{size} bytes were written")


def _arrange(entries: Sequence[Entry], *, is_labelled: bool) -> None:
    arranged = layout.arrange(entries, is_labelled=is_labelled)
    for file in arranged.files:
        if is_labelled and (problem := label_problem(file.label)):
            raise Broken(f"the class {file.label!r}: {problem}")
    # It is told in JSON.
    told = [file.name for file in arranged.files] + [row.path for row in arranged.left_out]
    msgspec.json.encode([*told, *(row.label for row in arranged.left_out)])
    files = sum(entry.kind is Kind.FILE and not is_noise(entry.name) for entry in entries)
    rows = sum(
        row.reason in (LeftOutReason.STRAY, LeftOutReason.UNREADABLE) for row in arranged.left_out
    )
    if files != len(arranged.files) + rows:
        raise Broken(f"of {files} files, {len(arranged.files)} are used and {rows} told of")


def with_checksums(data: bytes) -> bytes:
    """A tar whose headers have right checksums, wherever a header may lie."""
    if data[257:262] != b"ustar":
        return data
    fixed = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = f"{sum(fixed[at : at + 512]):06o}\0 ".encode()
    return bytes(fixed)


def seeds() -> list[bytes]:
    """Every format, and what makes tar and zip hard to read."""
    names = ["cat/1.png", "dog/deep/2.png", "caf\u00e9/" + "x" * 90 + "/" + "y" * 60, "train/cat/3"]
    made = [_tar(names, kind) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT)]
    made += [_tar(names, tarfile.PAX_FORMAT, {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"})]
    made += [_tar(names[:1], tarfile.PAX_FORMAT, {"GNU.sparse.major": "1", "size": "3"})]
    made += [_special(kind) for kind in (b"1", b"2", b"3", b"5", b"6", b"S", b"g", b"K")]
    made += [gzip.compress(data) for data in made[:3]]
    deep = [f"{n}/" + "f/" * 30 + "x" for n in range(3)]
    long = ["/".join(["d" * 255] * 16), "/".join(["d" * 250] * 3)]
    made += [_tar(these, tarfile.PAX_FORMAT) for these in (deep, deep[:1], long, long[1:])]
    made += [_zip(these, zipfile.ZIP_DEFLATED) for these in (deep, long)]
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        made += [_zip(names, compression), _zip(names[:1], compression, is_large=True)]
    return made


def _tar(names: list[str], form: int, headers: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, bufsize=512) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            info.pax_headers = headers or {}
            tar.addfile(info, io.BytesIO(b"PIC"))
    # Without the zeros that fill tar's last record, on which the search would be wasted.
    return out.getvalue().rstrip(b"\0").ljust(512, b"\0") + bytes(1024)


def _special(kind: bytes) -> bytes:
    info = tarfile.TarInfo("cat/1")
    info.type, info.linkname = kind, "../elsewhere"
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def _zip(names: list[str], compression: int, *, is_large: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as container:
        for name in names:
            with container.open(zipfile.ZipInfo(name), "w", force_zip64=is_large) as file:
                file.write(b"PIC" * 9)
    return out.getvalue()


TARGET = Target(
    "archives",
    run,
    seeds,
    modules=(
        "service.ingest.archives",
        "service.ingest.guarded",
        "service.ingest.layout",
        "service.ingest.names",
        "tarfile",
        "zipfile",
    ),
    max_bytes=16384,
)
