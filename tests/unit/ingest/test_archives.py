"""Archives of every format: what they hold, what is refused, and what is only named."""

import gzip
import io
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import Exhausted, InvalidInput, Reason
from service.ingest.archives import FILE_BYTES, ArchiveFormat, Limits, unpack
from service.ingest.folder import read_plain
from service.ingest.layout import Entry, Kind
from tests.unit.ingest.packing import FILES, MAKERS, Entries, tar_gz_of, tar_of, zip_of
from tests.unit.storage.conftest import LIMITS


def listed(
    tmp_path: Path, data: bytes, said: ArchiveFormat = "", limits: Limits = LIMITS
) -> list[Entry]:
    """Unpacks; fails when anything was written but one plain file."""
    into = tmp_path / "a" / "b" / "into"
    into.parent.mkdir(parents=True)
    archive = tmp_path / "archive"
    archive.write_bytes(data)
    try:
        with archive.open("rb") as opened:
            return unpack(opened, into, said, limits, lambda: None, lambda _: None)
    finally:
        beside = set(tmp_path.rglob("*")) - {into}
        assert beside == {archive, tmp_path / "a", tmp_path / "a" / "b"}
        assert not into.exists() or (into.is_file() and not into.is_symlink())


def unpacked(
    tmp_path: Path, data: bytes, said: ArchiveFormat = "", limits: Limits = LIMITS
) -> Entries:
    """Returns the files that were unpacked, by their names."""
    return {
        "/".join(entry.name): read_plain(entry.location)
        for entry in listed(tmp_path, data, said, limits)
        if entry.location is not None
    }


def refusal(tmp_path: Path, data: bytes, limits: Limits = LIMITS) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        unpacked(tmp_path, data, limits=limits)
    return caught.value


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("is_said", [True, False])
def test_every_format_is_unpacked_said_or_not(tmp_path: Path, kind: str, is_said: bool) -> None:
    said: ArchiveFormat = kind if is_said else ""  # type: ignore[assignment]
    assert unpacked(tmp_path, MAKERS[kind](FILES), said) == FILES


def test_a_tar_from_before_ustar_is_unpacked(tmp_path: Path) -> None:
    data = bytearray(tar_of({"cat/1.png": b"PIC"}))
    data[257:265] = bytes(8)
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    assert unpacked(tmp_path, bytes(data)) == {"cat/1.png": b"PIC"}


def test_a_format_that_is_not_the_one_said_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="said to be a zip and is a tar") as caught:
        unpacked(tmp_path, tar_of(FILES), "zip")
    assert caught.value.reason is Reason.ARCHIVE_UNREADABLE


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../evil",
        "cat/../../evil",
        "..",
        "C:/evil",
        "c:evil",
        "cat/./../evil",
    ],
)
def test_a_name_that_could_lead_elsewhere_refuses_the_archive(
    tmp_path: Path, kind: str, name: str
) -> None:
    error = refusal(tmp_path, MAKERS[kind]({"cat/1.png": b"PIC", name: b"evil"}))
    assert error.reason is Reason.ARCHIVE_UNSAFE
    assert ascii(name) in error.message


@pytest.mark.parametrize("name", ["cat\\..\\evil", "\\\\server\\evil", "..\\evil"])
def test_a_backslash_in_a_zip_leads_nowhere_else_either(tmp_path: Path, name: str) -> None:
    error = refusal(tmp_path, zip_of({"cat/1.png": b"PIC", name: b"evil"}))
    assert error.reason is Reason.ARCHIVE_UNSAFE


def test_a_backslash_stands_between_folders_in_a_zip_and_in_a_name_in_a_tar(tmp_path: Path) -> None:
    name = "cat\\deep\\1.png"
    assert unpacked(tmp_path / "zip", zip_of({name: b"PIC"})) == {"cat/deep/1.png": b"PIC"}
    assert [entry.name for entry in listed(tmp_path / "tar", tar_of({name: b"PIC"}))] == [(name,)]


def test_a_nul_in_a_name_refuses_the_archive(tmp_path: Path) -> None:
    info = tarfile.TarInfo("cat/1.png")
    info.pax_headers = {"path": "cat/1.png\0.txt"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO())
    assert refusal(tmp_path, out.getvalue()).reason is Reason.ARCHIVE_UNSAFE


def test_a_nul_in_a_zip_name_refuses_the_archive(tmp_path: Path) -> None:
    data = zip_of({"cat/1.pngX": b"PIC"}).replace(b"cat/1.pngX", b"cat/1.png\0")
    assert refusal(tmp_path, data).reason is Reason.ARCHIVE_UNSAFE


@pytest.mark.parametrize(
    ("type_", "kind"),
    [
        (tarfile.SYMTYPE, Kind.LINK),
        (tarfile.LNKTYPE, Kind.LINK),
        (tarfile.CHRTYPE, Kind.OTHER),
        (tarfile.BLKTYPE, Kind.OTHER),
        (tarfile.FIFOTYPE, Kind.OTHER),
        (tarfile.DIRTYPE, Kind.FOLDER),
    ],
)
def test_what_a_tar_holds_beside_files_is_named_and_not_made(
    tmp_path: Path, type_: bytes, kind: Kind
) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("cat/link")
        info.type, info.linkname = type_, "/etc/passwd"
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("cat/1.png"))
    found = listed(tmp_path, out.getvalue())
    assert [(entry.name, entry.kind) for entry in found] == [
        (("cat", "link"), kind),
        (("cat", "1.png"), Kind.FILE),
    ]
    assert found[0].location is None


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(stat.S_IFLNK, Kind.LINK), (stat.S_IFIFO, Kind.OTHER), (stat.S_IFCHR, Kind.OTHER)],
)
def test_what_a_zip_holds_beside_files_is_named_and_not_made(
    tmp_path: Path, mode: int, kind: Kind
) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as container:
        info = zipfile.ZipInfo("cat/link")
        info.external_attr = (mode | 0o777) << 16
        container.writestr(info, "/etc/passwd")
        container.writestr("dog/", b"")
    assert listed(tmp_path, out.getvalue()) == [
        Entry(("cat", "link"), kind),
        Entry(("dog",), Kind.FOLDER),
    ]


@pytest.mark.parametrize("kind", MAKERS)
def test_too_many_bytes_are_refused_as_they_are_counted(tmp_path: Path, kind: str) -> None:
    limits = Limits(10**9, 10_000, 100)
    data = MAKERS[kind]({f"cat/{n}": bytes(4000) for n in range(3)})
    error = refusal(tmp_path, data, limits)
    assert error.reason is Reason.ARCHIVE_TOO_LARGE


@pytest.mark.parametrize("kind", MAKERS)
def test_too_many_files_are_refused(tmp_path: Path, kind: str) -> None:
    error = refusal(tmp_path, MAKERS[kind]({f"cat/{n}": b"" for n in range(101)}))
    assert error.reason is Reason.ARCHIVE_TOO_LARGE
    assert "100" in error.message


def test_a_zip_directory_of_millions_is_refused_before_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = []
    original = zipfile.ZipInfo
    data = zip_of({f"cat/{n:060}": b"" for n in range(3000)})
    monkeypatch.setattr(zipfile, "ZipInfo", lambda *a: listed.append(a) or original(*a))
    error = refusal(tmp_path, data)
    assert error.reason is Reason.ARCHIVE_TOO_LARGE
    assert len(listed) == 0


def test_a_zip_that_lies_about_its_sizes_is_still_counted(tmp_path: Path) -> None:
    data = bytearray(zip_of({"cat/1": bytes(200_000)}))
    central = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, central + 24, 10)  # the unpacked size
    limits = Limits(10**9, 100_000, 100)
    assert refusal(tmp_path, bytes(data), limits).reason in (
        Reason.ARCHIVE_TOO_LARGE,
        Reason.ARCHIVE_UNREADABLE,
    )
    assert sum(p.stat().st_size for p in tmp_path.rglob("into")) <= 10**5


def test_a_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    limits = Limits(10**12, 10**12, 100)
    data = gzip.compress(tar_of({"cat/1": bytes(70 * 2**20)}), 9)
    error = refusal(tmp_path, data, limits)
    assert error.reason is Reason.ARCHIVE_TOO_LARGE
    assert "200 times" in error.message


def test_a_bomb_hidden_in_an_entry_that_is_left_out_is_refused(tmp_path: Path) -> None:
    limits = Limits(10**9, 10_000, 100)
    data = tar_gz_of({".hidden": bytes(5 * 2**20), "cat/1": b"PIC"})
    assert refusal(tmp_path, data, limits).reason is Reason.ARCHIVE_TOO_LARGE


def tar_header(size_field: bytes, kind: bytes = b"0", name: bytes = b"x") -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[124:136] = size_field
    header[156:157] = kind
    header[257:265] = b"ustar\00000"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K"])
@pytest.mark.parametrize(
    "size",
    [
        b"\xff" + b"\xff" * 10 + b"\x00",  # below 0
        b"\x80" + b"\x00" * 5 + b"\x7f" + b"\xff" * 5,  # exabytes
        b"77777777777\0",
    ],
    ids=["negative", "exabytes", "8 GiB"],
)
def test_a_forged_size_neither_loops_nor_eats_memory(
    tmp_path: Path, kind: bytes, size: bytes
) -> None:
    data = tar_header(size, kind) + bytes(10 * 512)
    assert refusal(tmp_path, data).reason in (Reason.ARCHIVE_UNREADABLE, Reason.ARCHIVE_TOO_LARGE)


def test_headers_nested_thousands_deep_are_refused(tmp_path: Path) -> None:
    nested = (tar_header(b"00000000001\0", b"L") + b"x".ljust(512, b"\0")) * 3000
    error = refusal(tmp_path, nested + tar_of({"cat/1": b"PIC"}))
    assert error.reason is Reason.ARCHIVE_UNREADABLE


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_a_truncated_archive_is_told(tmp_path: Path, kind: str, part: float) -> None:
    # Without tar's padding, so that the cut takes something away.
    whole = MAKERS[kind]({f"cat/{n}": bytes(range(256)) * 40 for n in range(20)})
    cut = whole.rstrip(b"\0") if kind == "tar" else whole
    error = refusal(tmp_path, cut[: int(len(cut) * part)])
    assert error.reason is Reason.ARCHIVE_UNREADABLE


def test_a_tar_cut_between_two_entries_is_told(tmp_path: Path) -> None:
    one = tar_of({"cat/1": b"PIC"})[:1024]
    assert refusal(tmp_path, one).reason is Reason.ARCHIVE_UNREADABLE


def test_a_damaged_header_in_the_middle_is_told(tmp_path: Path) -> None:
    data = bytearray(tar_of(FILES))
    data[1024 + 150] ^= 0xFF
    assert refusal(tmp_path, bytes(data)).reason is Reason.ARCHIVE_UNREADABLE


def test_a_gzip_with_a_wrong_checksum_is_told(tmp_path: Path) -> None:
    data = bytearray(tar_gz_of(FILES))
    data[-8] ^= 0xFF
    assert refusal(tmp_path, bytes(data)).reason is Reason.ARCHIVE_UNREADABLE


def test_a_damaged_zip_entry_is_told(tmp_path: Path) -> None:
    data = bytearray(zip_of({"cat/1": bytes(range(256))}, zipfile.ZIP_STORED))
    data[60] ^= 0xFF
    assert refusal(tmp_path, bytes(data)).reason is Reason.ARCHIVE_UNREADABLE


def test_an_encrypted_zip_is_told(tmp_path: Path) -> None:
    data = bytearray(zip_of({"cat/1": b"PIC"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    error = refusal(tmp_path, bytes(data))
    assert error.reason is Reason.ARCHIVE_UNREADABLE
    assert "encrypted" in error.message


def test_a_zip_packed_in_another_way_than_deflate_is_told(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as container:
        container.writestr("cat/1", b"PIC")
    error = refusal(tmp_path, out.getvalue())
    assert error.reason is Reason.ARCHIVE_UNREADABLE
    assert "deflate" in error.message


@pytest.mark.parametrize("data", [b"", b"no archive at all", b"\x89PNG\r\n", bytes(2000)])
def test_bytes_that_are_no_archive_are_told(tmp_path: Path, data: bytes) -> None:
    assert refusal(tmp_path, data).reason is Reason.ARCHIVE_UNREADABLE


@pytest.mark.parametrize("kind", MAKERS)
def test_hidden_and_system_entries_are_named_without_their_bytes(tmp_path: Path, kind: str) -> None:
    names = ["__MACOSX/cat/1", "cat/._1", ".git/x", "cat/Thumbs.db", "cat/@eaDir/1.jpg"]
    found = listed(tmp_path, MAKERS[kind]({**dict.fromkeys(names, b"PIC"), "cat/1": b"PIC"}))
    assert [("/".join(entry.name), entry.location is None) for entry in found] == [
        *((name, True) for name in names),
        ("cat/1", False),
    ]


def test_dots_and_doubled_slashes_are_dropped_from_names(tmp_path: Path) -> None:
    assert unpacked(tmp_path, tar_of({"./cat//1": b"PIC", "./": b""})) == {"cat/1": b"PIC"}


@pytest.mark.parametrize("name", ["cafe\u0301/1", "caf\udce9/1"], ids=["decomposed", "latin-1"])
def test_names_of_a_tar_come_as_they_are(tmp_path: Path, name: str) -> None:
    assert unpacked(tmp_path, tar_of({name: b"PIC"})) == {name: b"PIC"}


def zip_named(name: bytes) -> bytes:
    """A zip whose entry's name does not say its encoding."""
    return zip_of({"?" * len(name): b"PIC"}).replace(b"?" * len(name), name)


def test_a_zip_name_without_its_encoding_is_taken_for_utf_8(tmp_path: Path) -> None:
    assert unpacked(tmp_path, zip_named("café/1".encode())) == {"café/1": b"PIC"}


def test_a_zip_name_in_another_encoding_is_told_where_it_names_a_class(tmp_path: Path) -> None:
    found = unpacked(tmp_path / "1", zip_named(b"cat/caf\xe9"))
    assert list(found.values()) == [b"PIC"]
    error = refusal(tmp_path / "2", zip_named(b"caf\xe9/1"))
    assert error.reason is Reason.ARCHIVE_UNREADABLE
    assert "encoding" in error.message


@pytest.mark.parametrize("name", ["cat/" + "x" * 256, "/".join("d" * 40)])
def test_a_name_that_cannot_be_kept_is_told(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, tar_of({name: b"PIC"})).reason is Reason.ARCHIVE_UNREADABLE


def test_what_the_check_raises_stops_the_unpacking(tmp_path: Path) -> None:
    def stop() -> None:
        raise Exhausted(Reason.STORAGE_FULL, "stop")

    archive = tmp_path / "archive"
    archive.write_bytes(tar_of(FILES))
    with archive.open("rb") as opened, pytest.raises(Exhausted, match="stop"):
        unpack(opened, tmp_path / "into", "", LIMITS, stop, lambda _: None)
    assert (tmp_path / "into").read_bytes() == b""


@pytest.mark.parametrize("kind", MAKERS)
def test_the_room_is_asked_for_with_the_bytes_before_they_are_written(
    tmp_path: Path, kind: str
) -> None:
    archive = tmp_path / "archive"
    archive.write_bytes(MAKERS[kind]({f"cat/{n}": bytes(1000) for n in range(5)}))
    asked: list[int] = []

    def check_room(size_bytes: int) -> None:
        asked.append(size_bytes)
        if size_bytes > 3 * FILE_BYTES + 2500:
            raise Exhausted(Reason.QUOTA_EXCEEDED, "no room")

    into = tmp_path / "into"
    with archive.open("rb") as opened, pytest.raises(Exhausted, match="no room"):
        unpack(opened, into, "", LIMITS, lambda: None, check_room)
    files = [FILE_BYTES, FILE_BYTES + 1000]
    assert asked == [count + n * files[1] for n in range(3) for count in files]
    assert into.stat().st_size == 2000


def found_or_refused(tmp_path: Path, data: bytes) -> Entries:
    """Returns what is unpacked, nothing when the archive is refused; any other error fails."""
    try:
        return unpacked(tmp_path, data)
    except InvalidInput as error:
        if not error.reason.startswith("ARCHIVE_"):
            raise
        return {}


PARTS = st.sampled_from(["..", ".", "", "cat", "C:", "a\\b", "\0", "é", "con", "~", "x" * 300])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join) | st.text(max_size=40)


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(names=st.lists(NAMES, min_size=1, max_size=4), kind=st.sampled_from(sorted(MAKERS)))
def test_whatever_the_names_nothing_is_written_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], kind: str
) -> None:
    try:
        data = MAKERS[kind](dict.fromkeys(names, b"PIC"))
    except (ValueError, UnicodeError):
        return  # no archive can have that name
    found = found_or_refused(tmp_path_factory.mktemp("any"), data)
    assert set(found.values()) <= {b"PIC"}


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kind=st.sampled_from(sorted(MAKERS)), place=st.floats(0, 0.999), value=st.integers(0, 255))
def test_whatever_byte_is_damaged_the_answer_is_the_files_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, kind: str, place: float, value: int
) -> None:
    data = bytearray(MAKERS[kind](FILES))
    data[int(place * len(data))] = value
    found = found_or_refused(tmp_path_factory.mktemp("any"), bytes(data))
    assert len(found) <= len(FILES)
