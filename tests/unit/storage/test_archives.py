import gzip
import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import Exhausted, InvalidInput, Reason
from service.storage.archives import ArchiveFormat, Limits, unpack
from tests.unit.storage.conftest import LIMITS

Entries = dict[str, bytes]
FILES: Entries = {"cat/1.png": b"PIC1", "cat/deep/2.png": b"PIC2", "dog/3.png": b"PIC3"}


def tar_of(entries: Entries, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_gz_of(entries: Entries) -> bytes:
    return tar_of(entries, "w:gz")


def zip_of(entries: Entries, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as container:
        for name, data in entries.items():
            container.writestr(raw_zip_name(name), data)
    return out.getvalue()


def raw_zip_name(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = name  # past the cleaning that ZipInfo does
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


MAKERS: dict[str, Callable[[Entries], bytes]] = {
    "tar": tar_of,
    "tar.gz": tar_gz_of,
    "zip": zip_of,
}


def unpacked(
    tmp_path: Path, data: bytes, said: ArchiveFormat = "", limits: Limits = LIMITS
) -> Entries:
    """What is unpacked; fails when anything was written beside the folder."""
    into = tmp_path / "a" / "b" / "into"
    into.mkdir(parents=True)
    archive = tmp_path / "archive"
    archive.write_bytes(data)
    try:
        unpack(archive, into, said, limits, lambda: None)
    finally:
        inside = {p for p in tmp_path.rglob("*") if p.is_relative_to(into)}
        beside = set(tmp_path.rglob("*")) - inside
        assert beside == {archive, tmp_path / "a", tmp_path / "a" / "b"}
        assert not [p for p in inside if p.is_symlink()]
    return {str(p.relative_to(into)): p.read_bytes() for p in into.rglob("*") if p.is_file()}


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
        "cat\\..\\evil",
        "\\\\server\\evil",
    ],
)
def test_a_name_that_could_lead_elsewhere_refuses_the_archive(
    tmp_path: Path, kind: str, name: str
) -> None:
    error = refusal(tmp_path, MAKERS[kind]({"cat/1.png": b"PIC", name: b"evil"}))
    assert error.reason is Reason.ARCHIVE_UNSAFE
    assert ascii(name) in error.message


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
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_a_tar_with_a_link_or_a_device_is_refused(tmp_path: Path, kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("cat/link")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    error = refusal(tmp_path, out.getvalue())
    assert error.reason is Reason.ARCHIVE_UNSAFE
    assert "'cat/link'" in error.message


def test_a_zip_with_a_link_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as container:
        info = zipfile.ZipInfo("cat/link")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        container.writestr(info, "/etc/passwd")
    assert refusal(tmp_path, out.getvalue()).reason is Reason.ARCHIVE_UNSAFE


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
    assert sum(p.stat().st_size for p in tmp_path.rglob("into/**/*") if p.is_file()) <= 10**5


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


def test_an_archive_within_an_archive_is_just_a_file(tmp_path: Path) -> None:
    inner = zip_of(FILES)
    assert unpacked(tmp_path, tar_of({"cat/inner.zip": inner})) == {"cat/inner.zip": inner}


def test_noise_is_left_out_and_dots_are_dropped(tmp_path: Path) -> None:
    data = tar_of({"./cat//1": b"PIC", "__MACOSX/cat/1": b"", "cat/._1": b"", ".git/x": b""})
    assert unpacked(tmp_path, data) == {"cat/1": b"PIC"}


def test_names_are_kept_in_one_normal_form(tmp_path: Path) -> None:
    assert unpacked(tmp_path, tar_of({"cafe\u0301/1": b"PIC"})) == {"caf\u00e9/1": b"PIC"}


def test_a_name_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    data = tar_of({"caf\udce9/1": b"PIC"})
    assert refusal(tmp_path, data).reason is Reason.ARCHIVE_UNREADABLE


@pytest.mark.parametrize("name", ["cat/" + "x" * 256, "/".join("d" * 40)])
def test_a_name_that_cannot_be_kept_is_told(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path, tar_of({name: b"PIC"})).reason is Reason.ARCHIVE_UNREADABLE


@pytest.mark.parametrize("names", [("cat", "cat/1"), ("cat/1", "cat")])
def test_a_name_that_is_a_file_and_a_folder_is_told(tmp_path: Path, names: tuple[str, str]) -> None:
    data = tar_of(dict.fromkeys(names, b"PIC"))
    assert refusal(tmp_path, data).reason is Reason.ARCHIVE_UNREADABLE


def test_what_the_check_raises_stops_the_unpacking(tmp_path: Path) -> None:
    def stop() -> None:
        raise Exhausted(Reason.STORAGE_FULL, "stop")

    archive = tmp_path / "archive"
    archive.write_bytes(tar_of(FILES))
    with pytest.raises(Exhausted, match="stop"):
        unpack(archive, tmp_path, "", LIMITS, stop)
    assert list(tmp_path.iterdir()) == [archive]


def found_or_refused(tmp_path: Path, data: bytes) -> Entries:
    """What is unpacked, nothing when the archive is refused; any other error fails."""
    try:
        return unpacked(tmp_path, data)
    except InvalidInput as error:
        if not error.reason.startswith("ARCHIVE_"):
            raise
        return {}


PARTS = st.sampled_from(["..", ".", "", "cat", "C:", "a\\b", "\0", "é", "con", "~", "x" * 300])
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join) | st.text(max_size=40)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(sorted(MAKERS)), place=st.floats(0, 0.999), value=st.integers(0, 255))
def test_whatever_byte_is_damaged_the_answer_is_the_files_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, kind: str, place: float, value: int
) -> None:
    data = bytearray(MAKERS[kind](FILES))
    data[int(place * len(data))] = value
    found = found_or_refused(tmp_path_factory.mktemp("any"), bytes(data))
    assert len(found) <= len(FILES)
