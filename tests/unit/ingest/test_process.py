"""The reader's own process: what it reads, its limits, and the errors of its end."""

import errno
import fcntl
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil
import pytest
from PIL import Image

from service.domain import ClassCount, LeftOut, LeftOutReason
from service.errors import Exhausted, InvalidInput, Reason
from service.ingest import index as indexes
from service.ingest import reader
from service.ingest.archives import FILE_BYTES, Limits
from service.ingest.folder import read_plain
from service.ingest.packs import Location
from service.ingest.process import CURRENT_FILE, ReaderProcesses, Task
from service.ingest.reader import INDEX_FILE, PACK_FILE, RAW_FILE, Given, ReadRequest
from service.ops import failpoints
from tests.unit.ingest.kinds import base, encoded
from tests.unit.ingest.packing import MAKERS

GUARD_S = 60.0
LIMITS = Limits(2**24, 2**24, 1000)
MANY = (4100, 4100)
"""Pixels of an image of which one is decoded at a time."""

MakeRequest = Callable[..., ReadRequest]
MakeReader = Callable[..., ReaderProcesses]


class Gone(Exception):  # noqa: N818
    """The caller has left."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base(tmp_path / "insects")
    return tmp_path / "insects"


@pytest.fixture
def make_request(tmp_path: Path) -> MakeRequest:
    def make(**options: object) -> ReadRequest:
        (tmp_path / "work").mkdir()
        whole = {"work": str(tmp_path / "work"), "limits": LIMITS, **options}
        return ReadRequest(**whole)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_reader(tmp_path: Path) -> Iterator[MakeReader]:
    def make(fault: str = "", **options: object) -> ReaderProcesses:
        secrets = dict.fromkeys(("GRAFT_TOKEN", "DATABASE_URL", "HTTPS_PROXY"), "secret")
        environment = {**os.environ, failpoints.VARIABLE: fault, **secrets}
        return ReaderProcesses(tmp_path, environment, **{"threads": 2, **options})  # type: ignore[arg-type]

    yield make
    assert children() == []


def children() -> list[psutil.Process]:
    """The readers that run now."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE and "service.ingest" in child.cmdline():
                found.append(child)
    return found


def large_image() -> bytes:
    """Encodes an image of many pixels in few bytes."""
    out = io.BytesIO()
    Image.new("L", MANY).save(out, "PNG")
    return out.getvalue()


def test_a_folder_is_read_as_in_this_process(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    (folder / "ants/notes.txt").write_text("red ones")
    (folder / "ants/cut.png").write_bytes(encoded(60)[:200])
    asked = make_request(folder=str(folder))
    index = make_reader().read(asked).index
    here = reader.read_folder(folder)
    assert index == msgspec.structs.replace(here, images=[])
    assert index.classes == [ClassCount("ants", 3, 0), ClassCount("bees", 3, 0)]
    assert index.summary.left_out == [
        LeftOut(LeftOutReason.UNREADABLE, "ants", 1),
        LeftOut(LeftOutReason.WRONG_FORMAT, "ants", 1),
    ]
    assert indexes.load(Path(asked.work) / INDEX_FILE) == here


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_is_read(
    tmp_path: Path, make_request: MakeRequest, make_reader: MakeReader, kind: str
) -> None:
    files = {f"{label}/{n}.png": encoded(n) for n, label in enumerate(("ants", "bees", "ants"))}
    (tmp_path / "archive").write_bytes(MAKERS[kind](files))
    asked = make_request(archive=str(tmp_path / "archive"))
    read = make_reader().read(asked)
    assert read.index.classes == [ClassCount("ants", 2, 0), ClassCount("bees", 1, 0)]
    pack, images = Path(asked.work) / PACK_FILE, indexes.load(Path(asked.work) / INDEX_FILE).images
    assert {i.name: read_plain(Location(pack, i.offset, i.size)) for i in images} == files
    assert {image.pack for image in images} == {read.pack_digest}


def test_images_that_were_given_are_read(
    make_request: MakeRequest, make_reader: MakeReader
) -> None:
    contents = [encoded(n) for n in range(3)]
    starts = [0, len(contents[0]), len(contents[0]) + len(contents[1])]
    given = [
        Given(f"image {n}", "ants", "", starts[n % 3], len(contents[n % 3])) for n in range(2000)
    ]
    asked = make_request(given=given)
    (Path(asked.work) / RAW_FILE).write_bytes(b"".join(contents))
    summary = make_reader().read(asked).index.summary
    assert summary.left_out == [LeftOut(LeftOutReason.COPY, "ants", 1997)]


def test_what_is_wrong_with_a_dataset_is_told_with_its_reason(
    tmp_path: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    (tmp_path / "archive").write_bytes(MAKERS["tar"]({"../evil": b"x"}))
    with pytest.raises(InvalidInput, match="leads upwards") as caught:
        make_reader().read(make_request(archive=str(tmp_path / "archive")))
    assert caught.value.reason is Reason.ARCHIVE_UNSAFE


def test_progress_is_told(folder: Path, make_request: MakeRequest, make_reader: MakeReader) -> None:
    told: list[tuple[int, int]] = []
    make_reader().read(
        make_request(folder=str(folder)), on_progress=lambda *counts: told.append(counts)
    )
    assert told[0] == (0, 6)
    assert told == sorted(told)
    assert {total for _, total in told} == {6}


def test_a_file_that_ends_the_process_is_named(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    work = make_request(folder=str(folder))
    with pytest.raises(Exhausted, match=r"ran out of memory at 'ants/000\.png': ") as caught:
        make_reader("kill@dataset.decoding", threads=1).read(work)
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_a_decoder_that_a_file_breaks_is_told_with_the_file(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    asked = make_request(folder=str(folder))

    def go_on() -> None:
        if noted(asked):
            for child in children():
                with suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGSEGV)

    said = r"was ended by SIGSEGV at 'ants/000\.png': a file breaks the decoder"
    with pytest.raises(InvalidInput, match=said) as caught:
        make_reader("hang@dataset.decoding", threads=1).read(asked, go_on)
    assert caught.value.reason is Reason.DATASET_UNUSABLE


def noted(asked: ReadRequest) -> bool:
    """Tells whether a file is being decoded."""
    file = Path(asked.work) / CURRENT_FILE
    return file.exists() and bool(file.read_bytes().strip(b"\0"))


def test_an_image_for_which_there_is_no_memory_is_no_fault_of_the_dataset(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    out = io.BytesIO()
    # Decoded and converted it is 200 MB and more.
    Image.new("L", (7000, 7000)).save(out, "PNG")
    (folder / "ants/large.png").write_bytes(out.getvalue())
    with pytest.raises(Exhausted) as caught:
        make_reader(threads=1, memory_bytes=addresses() + 100 * 2**20).read(
            make_request(folder=str(folder))
        )
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def addresses() -> int:
    """Measures the memory that a reader's process takes before it reads."""
    said = subprocess.run(
        (
            sys.executable,
            "-c",
            "import service.ingest.__main__, psutil; print(psutil.Process().memory_info().vms)",
        ),
        check=True,
        capture_output=True,
    )
    return int(said.stdout)


def test_a_process_without_memory_for_its_threads_says_so(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    with pytest.raises(Exhausted) as caught:
        make_reader(memory_bytes=2**20).read(make_request(folder=str(folder)))
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_memory_that_python_itself_asks_for_in_vain_is_told(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    with pytest.raises(Exhausted, match="ran out of memory: send smaller images") as caught:
        make_reader("memory@dataset.decoding").read(make_request(folder=str(folder)))
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_a_dataset_that_takes_too_much_processor_time_is_refused(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    out = io.BytesIO()
    Image.new("L", (3000, 3000)).save(out, "PNG")
    (folder / "ants/large.png").write_bytes(out.getvalue())
    for number in range(300):
        os.link(folder / "ants/large.png", folder / f"ants/large{number}.png")
    with pytest.raises(InvalidInput, match="more processor time than so many may") as caught:
        make_reader(cpu_s=1, file_cpu_s=0).read(make_request(folder=str(folder)))
    assert caught.value.reason is Reason.DATASET_UNUSABLE


def test_what_go_on_raises_ends_the_process(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    asked = make_request(folder=str(folder))
    seen: list[psutil.Process] = []

    def go_on() -> None:
        if noted(asked):
            seen.extend(children())
            raise Gone

    with pytest.raises(Gone):
        make_reader("hang@dataset.decoding").read(asked, go_on)
    assert len(seen) == 1
    assert not seen[0].is_running()


def test_a_process_whose_server_has_gone_ends_by_itself(
    tmp_path: Path, folder: Path, make_request: MakeRequest
) -> None:
    task = Task(
        request=make_request(folder=str(folder)), threads=1, niceness=0, memory_bytes=2**32,
        cpu_s=1000, file_cpu_s=1, turn_file=str(tmp_path / "turn"),
    )  # fmt: skip
    with subprocess.Popen(
        (sys.executable, "-m", "service.ingest"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, failpoints.VARIABLE: "hang@dataset.decoding"},
    ) as process:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(task) + b"\n")
        process.stdin.close()
        assert process.wait(GUARD_S) == 1


def test_a_full_disk_is_told_as_one(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    asked = make_request(folder=str(folder))
    (Path(asked.work) / INDEX_FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        make_reader().read(asked)
    assert caught.value.errno == errno.ENOSPC


def test_what_there_is_no_room_for_is_told_with_its_size(
    tmp_path: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    (tmp_path / "archive").write_bytes(MAKERS["tar"]({f"a/{n}": bytes(100) for n in range(9)}))
    room = 3 * FILE_BYTES + 250
    with pytest.raises(reader.OverRoom) as caught:
        make_reader().read(make_request(archive=str(tmp_path / "archive"), max_new_bytes=room))
    assert caught.value.size_bytes == 3 * FILE_BYTES + 300


def test_a_fault_of_the_reader_itself_is_told_with_its_last_words(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended with code 1.*is no ACTION@POINT"):
        make_reader("nonsense").read(make_request(folder=str(folder)))


def test_a_reader_is_nicer_knows_no_secret_and_is_of_no_terminal(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    asked = make_request(folder=str(folder))
    seen: list[tuple[int, set[str], bool]] = []

    def go_on() -> None:
        if noted(asked):
            (child,) = children()
            secrets = {"GRAFT_TOKEN", "DATABASE_URL", "HTTPS_PROXY"} & child.environ().keys()
            seen.append((child.nice(), secrets, os.getsid(child.pid) == child.pid))
            status = Path(f"/proc/{child.pid}/status").read_text()
            assert "NoNewPrivs:\t1" in status
            raise Gone

    with pytest.raises(Gone):
        make_reader("hang@dataset.decoding", niceness=7).read(asked, go_on)
    assert seen == [(max(7, psutil.Process().nice()), set(), True)]


def test_one_image_of_many_pixels_is_decoded_at_a_time(
    tmp_path: Path, folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    (folder / "ants/large.png").write_bytes(large_image())
    asked = make_request(folder=str(folder))
    current = Path(asked.work) / CURRENT_FILE
    looks = 0

    def go_on() -> None:
        nonlocal looks
        # Long after all other images are decoded.
        if current.exists() and current.read_bytes().strip(b"\0") == b"ants/large.png":
            looks += 1
        if looks == 10:
            raise Gone

    with (tmp_path / "turn").open("wb") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        with pytest.raises(Gone):
            make_reader().read(asked, go_on)
    assert make_reader().read(asked).index.summary.used == 7


def test_readers_beyond_a_few_wait_and_may_leave(
    folder: Path, make_request: MakeRequest, make_reader: MakeReader
) -> None:
    readers = make_reader()
    readers._reading[""] = 3
    asked, looks = make_request(folder=str(folder)), 0

    def go_on() -> None:
        nonlocal looks
        looks += 1
        assert children() == []
        if looks == 2:
            raise Gone

    with pytest.raises(Gone):
        readers.read(asked, go_on)
    # Of another tenant there is a place still.
    other = msgspec.structs.replace(asked, tenant="acme")
    assert readers.read(other).index.summary.used == 6
    readers._reading[""] = 2
    assert readers.read(asked).index.summary.used == 6
