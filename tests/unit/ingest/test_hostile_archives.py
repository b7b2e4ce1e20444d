"""Archives that are made to cost much, or to be read as something else than they are."""

import gzip
import io
import resource
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

import pytest

from service.errors import InvalidInput, Reason
from service.ingest.archives import Limits
from service.ingest.layout import Kind, arrange
from tests.unit.ingest.packing import MAKERS, tar_of, zip_of
from tests.unit.ingest.test_archives import (
    found_or_refused,
    listed,
    refusal,
    tar_header,
    unpacked,
)

LARGE = Limits(2**31, 2**33, 100_000)
END = bytes(1024)


def record(key: bytes, value: bytes) -> bytes:
    """Makes one record of a pax header, whose length counts its own digits."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length = len(str(length)) + len(rest)
    return str(length).encode() + rest


def entry(kind: bytes, content: bytes = b"", name: bytes = b"cat/1") -> bytes:
    header = tar_header(f"{len(content):011o}\0".encode(), kind, name)
    return header + content + bytes(-len(content) % 512)


def costs(tmp_path: Path, data: bytes) -> tuple[InvalidInput, float, int]:
    """Returns the refusal, the seconds of computing and the bytes that the process grew by."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    error = refusal(tmp_path, data, LARGE)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return error, time.process_time() - started, grown * 1024


SPARSE = b"".join(
    record(b"GNU.sparse." + key, value)
    for key, value in ((b"major", b"1"), (b"minor", b"0"), (b"name", b"cat/1"), (b"realsize", b"5"))
)
HOLES = b"1000000\n" + b"1\n" * 2_000_000

EXPENSIVE = {
    # Hours in tarfile's regular expressions before Python 3.11.10.
    "digits in a pax header": entry(b"x", b"1" * 500_000) + entry(b"0"),
    "digits in a pax value": entry(b"x", record(b"a", b"1" * 500_000)) + entry(b"0"),
    "digits in a global header": entry(b"g", b"1" * 500_000) + entry(b"0"),
    # Every record's key would be all that follows.
    "pax records that lie": entry(b"x", b"5 aaa" * 100_000 + b"=") + entry(b"0"),
    "a long list of holes": entry(b"x", SPARSE) + entry(b"0", HOLES),
    "a chain of holes": tar_header(b"00000000001\0", b"S")[:482] + b"\1" + bytes(29)
    + (b"00000000001\0" * 42 + b"\1" + bytes(7)) * 4000,
    "a chain of global headers":
        b"".join(entry(b"g", record(b"k%d" % n, b"v" * 9000)) for n in range(200)) + entry(b"0"),
    "global headers between the entries": b"".join(
        entry(b"g", record(b"k%d" % n, b"v" * 9000)) + entry(b"0", name=b"cat/%d" % n)
        for n in range(200)
    ),
    "a chain of long names": entry(b"L", b"x" * 9000) * 200 + entry(b"0"),
}  # fmt: skip


def with_checksum(data: bytes) -> bytes:
    header = bytearray(data[:512])
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + data[512:]


@pytest.mark.parametrize("name", EXPENSIVE)
def test_headers_that_are_made_to_cost_much_are_refused_cheaply(tmp_path: Path, name: str) -> None:
    data = gzip.compress(with_checksum(EXPENSIVE[name]) + END, 1)
    error, seconds, grown = costs(tmp_path, data)
    assert error.reason is Reason.ARCHIVE_UNREADABLE
    assert seconds < 2
    assert grown < 100 * 2**20


def test_a_zip_directory_as_large_as_the_upload_is_not_read(tmp_path: Path) -> None:
    data = bytearray(bytes(8 * 2**20) + zip_of({"cat/1": b"PIC"}))
    end = data.rindex(b"PK\5\6")
    struct.pack_into("<I", data, end + 12, end - 4)  # the size of the directory
    data[:4] = b"PK\3\4"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(tmp_path, bytes(data)).reason is Reason.ARCHIVE_UNREADABLE
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4 * 2**20


def test_a_zip_whose_entries_are_all_the_same_bytes_is_refused(tmp_path: Path) -> None:
    raw = bytes(4 * 2**20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(raw) + packer.flush()
    sizes = (zlib.crc32(raw), len(packed), len(raw), 5)
    local = struct.pack("<4s5HIIIHH", b"PK\3\4", 20, 0, 8, 0, 0, *sizes, 0) + b"cat/1" + packed
    central = (
        struct.pack("<4s6HIII5HII", b"PK\1\2", 20, 20, 0, 8, 0, 0, *sizes, *[0] * 6) + b"cat/1"
    )
    count = 50
    tail = struct.pack(
        "<4s4HIIH", b"PK\5\6", 0, 0, count, count, len(central) * count, len(local), 0
    )
    limits = Limits(2**31, 2**33, 100)
    error = refusal(tmp_path, local + central * count + tail, limits)
    assert error.reason in (Reason.ARCHIVE_TOO_LARGE, Reason.ARCHIVE_UNREADABLE)


def test_a_zip64_archive_is_unpacked(tmp_path: Path) -> None:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w") as container,
        container.open(zipfile.ZipInfo("cat/1"), "w", force_zip64=True) as file,
    ):
        file.write(b"PIC")
    assert unpacked(tmp_path, out.getvalue()) == {"cat/1": b"PIC"}


@pytest.mark.parametrize("size", [2**63, 2**64 - 1, 10**12])
def test_a_zip64_archive_that_lies_about_its_sizes_gives_no_more_than_it_holds(
    tmp_path: Path, size: int
) -> None:
    data = bytearray(zip_of({"cat/1": b"PIC" * 99}))
    at = data.index(b"PK\1\2")
    struct.pack_into("<II", data, at + 20, 2**32 - 1, 2**32 - 1)
    struct.pack_into("<H", data, at + 30, 20)  # the length of the extra field
    name_end = at + 46 + 5
    data[name_end:name_end] = struct.pack("<HHQQ", 1, 16, size, size)
    end = data.rindex(b"PK\5\6")
    struct.pack_into("<I", data, end + 12, end - at)
    assert found_or_refused(tmp_path, bytes(data)) in ({}, {"cat/1": b"PIC" * 99})


@pytest.mark.parametrize("kind", MAKERS)
def test_of_a_name_that_comes_twice_the_last_counts(tmp_path: Path, kind: str) -> None:
    data = MAKERS[kind]({"cat/1": b"first", "./cat//1": b"last"})
    assert unpacked(tmp_path, data) == {"cat/1": b"last"}


@pytest.mark.parametrize("kind", MAKERS)
def test_names_that_differ_in_case_are_two(tmp_path: Path, kind: str) -> None:
    entries = {"cat/1.png": b"a", "cat/1.PNG": b"b"}
    assert unpacked(tmp_path, MAKERS[kind](entries)) == entries


@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_s_name_may_hold_what_a_class_s_may_not(tmp_path: Path, kind: str) -> None:
    # Nothing but messages shows them, and these as ASCII.
    entries = {"cat/1\r.png": b"PIC", "cat/\u202egnp.exe": b"PIC"}
    assert unpacked(tmp_path, MAKERS[kind](entries)) == entries


def test_names_that_long_in_gnu_s_way_are_kept_whatever_letters_they_hold(tmp_path: Path) -> None:
    # "x" and "g" are kinds of headers where a name's 157th letter lies.
    names = ["/".join([letter * 99] * 3) for letter in "xgXLK"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    assert unpacked(tmp_path, out.getvalue()) == dict.fromkeys(names, b"")


def test_a_pax_header_may_rename_an_entry_and_what_it_says_is_checked(tmp_path: Path) -> None:
    good = entry(b"x", record(b"path", b"dog/2")) + entry(b"0", b"PIC")
    assert unpacked(tmp_path / "1", good + END) == {"dog/2": b"PIC"}
    bad = entry(b"x", record(b"path", b"../../evil")) + entry(b"0", b"PIC")
    assert refusal(tmp_path / "2", bad + END).reason is Reason.ARCHIVE_UNSAFE


@pytest.mark.parametrize("size", [b"-5", b"9" * 18, b"1e5", b"0x10"])
def test_a_pax_header_that_lies_about_the_size_is_refused(tmp_path: Path, size: bytes) -> None:
    data = entry(b"x", record(b"size", size)) + entry(b"0", b"PIC") + END
    assert refusal(tmp_path, data).reason in (Reason.ARCHIVE_UNREADABLE, Reason.ARCHIVE_TOO_LARGE)


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    holes = record(b"GNU.sparse.map", b"0,3") + record(b"GNU.sparse.size", b"3")
    error = refusal(tmp_path, entry(b"x", holes) + entry(b"0", b"PIC") + END)
    assert error.reason is Reason.ARCHIVE_UNREADABLE
    assert "sparse" in error.message


def test_nothing_is_written_through_a_link_that_an_archive_brings(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        link = tarfile.TarInfo("cat")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
        info = tarfile.TarInfo("cat/1.png")
        tar.addfile(info)
    entries = listed(tmp_path, out.getvalue())
    assert [entry.kind for entry in entries] == [Kind.LINK, Kind.FILE]
    with pytest.raises(InvalidInput, match="a file and a folder at once") as caught:
        arrange(entries, is_labelled=True)
    assert caught.value.reason is Reason.ARCHIVE_UNREADABLE


@pytest.mark.parametrize("inner", ["tar", "tar.gz", "zip"])
def test_an_archive_in_an_archive_is_not_opened(tmp_path: Path, inner: str) -> None:
    nested = MAKERS[inner]({"../evil": b"x"})
    assert unpacked(tmp_path, tar_of({"cat/1": nested})) == {"cat/1": nested}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["/".join(["d" * 250] * 20), "/".join(["d" * 255] * 4)])
def test_a_name_that_is_too_long_as_a_whole_is_told(tmp_path: Path, kind: str, name: str) -> None:
    error = refusal(tmp_path, MAKERS[kind]({name: b"PIC"}))
    assert error.reason is Reason.ARCHIVE_UNREADABLE
    assert "longer than 1000 bytes" in error.message
