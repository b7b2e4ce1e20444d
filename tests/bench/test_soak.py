"""The soak stays a program that works, and one that finds what is wrong."""

import json
import random
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from graftml.errors import NotFound, ResourceExhausted
from graftml_stubs.v1 import prediction_pb2
from PIL import Image

from bench.soak import drawing, verdict
from bench.soak.__main__ import _on_signals
from bench.soak.book import OK, Book, Kill, Mark
from bench.soak.load import Target, is_answer
from bench.soak.served import Crash, Served, Tenant
from tests.unit.test_fsck import whole

__all__ = ["whole"]

ROOT = Path(__file__).parents[2]
GUARD_S = 600.0
"""After which a soak that does not end is broken."""

CALLS = ("FineTune | ok", "UploadDataset, cancelled | CANCELLED", "ModelInfer | ok")
"""Some of what it makes."""
OF_SPEED = {"too much of the steady load was refused", "the steady load got no answer"}
"""What it also finds where it got next to no processor time."""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A soak that trains nothing, so that seconds are enough for many jobs."""
    for number in range(16):
        for label, colour in (("red", (200 + number, 9, 9)), ("blue", (9, 9, 200 + number))):
            (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
            photo = Image.new("RGB", (320, 240), colour)
            photo.save(tmp_path / "photos" / label / f"{number}.jpg")
    # Deadlines of the service that none of its work shall miss.
    unhurried = [f"{name}-timeout-s=300" for name in ("predict", "load", "message", "database")]
    options = "--module bench.instant --capacity 0.3 --max-rate 60 --faster 25"
    return [
        *(sys.executable, "-m", "bench.soak", str(tmp_path / "photos")),
        *("--out", str(tmp_path / "out"), *options.split()),
        *("--flags", "threads=1", "warm-trainers=0", *unhurried, "drain-s=80"),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_signal_tells_a_soak_to_end(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    told: list[int] = []
    try:
        _on_signals(lambda got, _frame: told.append(got))
        signal.raise_signal(number)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert told == [number]


@pytest.mark.e2e
def test_a_soak_that_is_told_to_end_tells_what_there_is_and_leaves_no_server(
    command: list[str], tmp_path: Path
) -> None:
    with subprocess.Popen(
        [*command, "--minutes=9"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as soak:
        assert soak.stdout is not None
        while "steady load" not in soak.stdout.readline():
            assert soak.poll() is None
        served = psutil.Process(soak.pid).children(recursive=True)
        soak.send_signal(signal.SIGTERM)
        told, _ = soak.communicate(timeout=GUARD_S)
    assert served
    assert psutil.wait_procs(served, timeout=GUARD_S)[1] == []
    assert "ending with what there is" in told
    assert "findings: " in (tmp_path / "out" / "soak.md").read_text()


def found(text: str) -> set[str]:
    """The kinds of findings that a report tells."""
    kinds = set(re.findall(r"^- \d+ x (.+)$", text, re.MULTILINE))
    assert bool(kinds) != ("findings: none" in text)
    return kinds


@pytest.mark.e2e
def test_a_short_soak_finds_nothing_ends_well_and_draws_its_chart(
    command: list[str], tmp_path: Path
) -> None:
    for minutes in (0.04, 0.4, 4.0):
        done = subprocess.run(
            [*command, f"--minutes={minutes}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
        )
        text = (tmp_path / "out" / "soak.md").read_text()
        kinds = found(text)
        assert kinds <= OF_SPEED, done.stdout + done.stderr
        assert done.returncode == (1 if kinds else 0), done.stdout + done.stderr
        missing = [call for call in CALLS if call not in text]
        # Where others have all the cores seconds are too short for all of it.
        if not kinds and not missing:
            break
    assert not kinds
    assert not missing
    image = ET.fromstring((tmp_path / "out" / "soak.svg").read_text())
    assert len(image.findall(".//{*}polyline")) == sum(len(p.lines) for p in drawing.PANELS)
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert sum(sample["good"] or 0 for sample in samples) > 0


def test_a_call_that_fails_and_should_not_is_a_finding_and_marked() -> None:
    book = Book()
    error = NotFound("gone", reason="MODEL_NOT_FOUND", code=grpc.StatusCode.NOT_FOUND)

    def fail() -> None:
        raise error

    assert book.call("Predict", OK, fail) is None
    assert book.findings.counts == {"Predict answered MODEL_NOT_FOUND": 1}
    assert "| Predict | MODEL_NOT_FOUND **!** | 1 |" in verdict.table(book)
    assert "gone" in verdict.findings(book)


@pytest.mark.parametrize(
    ("may", "fails"), [(OK, False), ({OK, "QUEUE_FULL"}, True), ({"RESOURCE_EXHAUSTED"}, True)]
)
def test_a_call_that_ends_as_it_may_is_none(may: set[str] | str, fails: bool) -> None:
    book = Book()
    reason = "" if may == {"RESOURCE_EXHAUSTED"} else "QUEUE_FULL"

    def call() -> int:
        if fails:
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
            raise ResourceExhausted("full", reason=reason, code=code)
        return 1

    assert book.call("Predict", may, call) == (None if fails else 1)
    assert not book.findings.counts


def test_a_call_that_succeeds_and_must_not_is_a_finding() -> None:
    book = Book()
    book.call("A wrong token", "TOKEN_UNKNOWN", lambda: 1)
    assert book.findings.counts == {"A wrong token answered ok": 1}


def test_what_a_thread_dies_of_is_a_finding() -> None:
    book = Book()
    with book.at_work("the tuner"):
        raise RuntimeError("no")
    assert book.findings.counts == {"the tuner died": 1}


def test_samples_of_findings_are_bounded() -> None:
    book = Book()
    for number in range(1000):
        book.find("a job was lost", str(number))
    assert book.findings.counts.total() == 1000
    assert len(book.findings.samples["a job was lost"]) < 10


def test_a_job_is_killed_once_and_only_while_it_is_under_way() -> None:
    book = Book()
    for job in ("one", "two"):
        book.job_started(job, "acme")
    assert book.doom("one")
    assert not book.doom("one")
    book.job_ended("two", "SUCCEEDED", 1)
    assert not book.doom("two")
    assert not book.doom("unknown")
    assert not book.doom("")


@pytest.mark.parametrize(
    ("state", "is_cancelled", "is_finding"),
    [
        ("SUCCEEDED", False, False),
        ("FAILED", False, True),
        ("CANCELLED", False, True),
        ("CANCELLED", True, False),
        ("FAILED", True, True),
    ],
)
def test_a_job_ends_as_it_was_asked_to(state: str, is_cancelled: bool, is_finding: bool) -> None:
    book = Book()
    book.job_started("job", "acme", is_cancelled=is_cancelled)
    book.job_ended("job", state, 1)
    assert bool(book.findings.counts) is is_finding


def test_broken_stores_are_findings(whole: Path) -> None:
    book = Book()
    verdict.stores_are_sound(book, whole)
    assert not book.findings.counts
    blobs = sorted((whole / "blobs").glob("??/*"))
    contents = [(path, path.read_bytes()) for path in blobs]
    for path in blobs:
        path.unlink()
    verdict.stores_are_sound(book, whole)
    assert set(book.findings.counts) == {"the stores are broken"}
    for path, content in contents:
        path.write_bytes(content)


class FakeServed:
    """A server's end."""

    def __init__(self, code: int, complaints: dict[str, int]) -> None:
        self._code, self._complaints = code, complaints

    def drain(self) -> tuple[int, float]:
        return self._code, 1.5

    def complaints(self) -> dict[str, int]:
        return self._complaints

    def crashes(self) -> list[Crash]:
        return []

    def deaths(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("code", "complaints", "findings"),
    [
        (0, {}, 0),
        (1, {}, 1),
        (0, {"unexpected error 1234": 1}, 1),
    ],
)
def test_a_server_that_ends_badly_or_complains_is_a_finding(
    code: int, complaints: dict[str, int], findings: int
) -> None:
    book = Book()
    served: Any = FakeServed(code, complaints)
    assert verdict.server_ends_well(book, served) == 1.5
    assert book.findings.counts.total() == findings


CRASH = "the trainer crashed (-9); its last words:"


def killed(*kills: Kill, attempts: int = 2, is_cancelled: bool = False) -> Book:
    """A soak with one job, which succeeded."""
    book = Book()
    book.job_started("job", "acme", is_cancelled=is_cancelled)
    book.job_ended("job", "SUCCEEDED", attempts)
    for kill in kills:
        book.killed(kill)
    return book


OF_JOB = Kill(7, "job", 100.0, had_result=False)
OF_WAITING = Kill(8, "", 100.0, had_result=False)
BY_ITSELF = "a trainer crashed by itself"
AGAIN = "a job was tried again though its trainer was not killed"
NOT_AGAIN = "a job whose trainer was killed was not tried again"


@pytest.mark.parametrize(
    ("book", "crashes", "deaths", "findings"),
    [
        (killed(attempts=1), [], 0, set()),
        (killed(OF_JOB), [100.1], 0, set()),
        # One that crashes by itself every other time.
        (killed(), [100.1], 0, {BY_ITSELF, AGAIN}),
        (killed(OF_JOB, attempts=3), [100.1, 101.0], 0, {BY_ITSELF, AGAIN}),
        (killed(), [], 0, {AGAIN}),
        (killed(OF_JOB, attempts=1), [], 0, {NOT_AGAIN}),
        (killed(Kill(7, "job", 100.0, had_result=True), attempts=1), [], 0, set()),
        (killed(OF_JOB, attempts=1, is_cancelled=True), [], 0, set()),
        # It was given the job as it was killed; later crashes are its own.
        (killed(OF_WAITING), [100.2], 0, set()),
        (killed(OF_WAITING), [190.0], 0, {BY_ITSELF, AGAIN}),
        (killed(OF_WAITING, attempts=1), [], 1, set()),
        (killed(attempts=1), [], 1, {"waiting trainers died by themselves"}),
    ],
)
def test_kills_alone_excuse_crashes_and_must_be_borne(
    book: Book, crashes: list[float], deaths: int, findings: set[str]
) -> None:
    verdict.crashes_are_kills(book, [Crash("job", at, CRASH) for at in crashes], deaths)
    assert set(book.findings.counts) == findings


def test_crashes_are_read_from_the_log_with_their_jobs_and_are_no_complaints(
    tmp_path: Path,
) -> None:
    lines: list[dict[str, str]] = [
        {"level": "ERROR", "message": f"{CRASH}\nwords", "job_id": "job"},
        {"level": "WARNING", "message": "a waiting trainer had died: words"},
        {"level": "ERROR", "message": "unexpected error 1234"},
    ]
    served = object.__new__(Served)
    served.log_file = tmp_path / "service.log"
    text = "".join(json.dumps({"time": "2026-11-25 00:11:03,250", **line}) + "\n" for line in lines)
    served.log_file.write_text(text + "Traceback\n")
    (crash,) = served.crashes()
    assert (crash.job_id, crash.at % 1) == ("job", 0.25)
    assert served.deaths() == 1
    assert served.complaints() == {"unexpected error 1234": 1, "Traceback": 1}


def answered(label: str, model: str = "stable") -> prediction_pb2.PredictResponse:
    score = prediction_pb2.ClassScore(label=label)
    result = prediction_pb2.ImageResult(
        classification=prediction_pb2.Classification(scores=[score])
    )
    answer = prediction_pb2.ModelAnswer(model=model, results=[result])
    return prediction_pb2.PredictResponse(answers=[answer])


@pytest.mark.parametrize(
    ("answer", "place", "is_right"),
    [
        (answered("acme-ants"), 0, True),
        (answered("acme-bees"), 0, False),
        # The model is not sure of this one.
        (answered("acme-bees"), 1, True),
        (answered("globex-ants"), 1, False),
        (answered("acme-ants", "another"), 1, False),
        (
            prediction_pb2.PredictResponse(answers=[prediction_pb2.ModelAnswer(model="stable")]),
            1,
            False,
        ),
    ],
)
def test_an_answer_has_the_models_own_classes_and_the_label_that_it_is_sure_of(
    answer: prediction_pb2.PredictResponse, place: int, is_right: bool
) -> None:
    target = Target("", "stable", ["acme-ants", "acme-bees"], ["acme-ants", ""])
    assert is_answer(answer, target, place) is is_right


@pytest.mark.parametrize(
    ("labels", "owns"), [(["acme-a", "acme-b"], True), (["acme-a", "globex-a"], False), ([], False)]
)
def test_a_tenant_knows_its_own_labels(labels: list[str], owns: bool) -> None:
    assert Tenant("acme").owns(labels) is owns


class FakeClient:
    """What a server knows."""

    def __init__(self, jobs: list[Any], versions: list[Any]) -> None:
        self._jobs, self._versions = jobs, versions

    def list_jobs(self, states: object = ()) -> Any:
        return iter([] if states else self._jobs)

    def list_versions(self, model: str) -> Any:
        return iter(self._versions)


def test_a_lost_job_and_a_lost_version_are_findings() -> None:
    book = Book()
    book.job_started("job", "acme")
    book.published("acme", "ants", 1)
    client: Any = FakeClient([], [])
    verdict.nothing_is_lost(client, book, verdict.Tenant("globex"))
    assert not book.findings.counts
    verdict.nothing_is_lost(client, book, verdict.Tenant("acme"))
    assert book.findings.counts == {"a job was lost": 1, "a version was lost": 1}


@pytest.mark.parametrize(("refused", "is_finding"), [(5, False), (50, True)])
def test_rare_refusals_of_the_steady_load_are_none(refused: int, is_finding: bool) -> None:
    book = Book()
    verdict.load_is_carried(book, Counter({OK: 1000, "QUEUE_FULL": refused}))
    assert bool(book.findings.counts) is is_finding


def samples(**growth: float) -> list[dict[str, float]]:
    start = {"pss_mib": 100.0, "anonymous_mib": 200.0, "descriptors": 30.0, "threads": 20.0}
    return [
        {
            "at_s": at * 60.0,
            **{key: value + at * growth.get(key, 0) for key, value in start.items()},
        }
        for at in range(61)
    ]


def test_what_piles_up_is_a_finding() -> None:
    for growth, count in (({}, 0), ({"descriptors": 2.0}, 1), ({"threads": 1.0}, 1)):
        book = Book()
        verdict.nothing_piles_up(book, samples(**growth))
        assert book.findings.counts.total() == count, growth


def remembered(growth: Callable[[float], float], minutes: float = 30) -> list[dict[str, float]]:
    """The memory of a healthy server, which jobs and exports move by 40 MiB, and a growth."""
    draw = random.Random(4)
    return [
        {"at_s": at, "anonymous_mib": 270 + draw.uniform(0, 40) + growth(at / 60)}
        for at in range(int(60 * minutes))
    ]


@pytest.mark.parametrize(
    ("growth", "minutes", "is_finding"),
    [
        (lambda at: 0, 30, False),
        # What is filled once, early or late, and a little more after it.
        (lambda at: 60 * (at > 3), 30, False),
        (lambda at: 100 * (at > 13), 30, False),
        (lambda at: 100 * (at > 23), 30, False),
        (lambda at: at, 30, False),
        (lambda at: 10 * at, 30, True),
        (lambda at: 5 * at, 60, True),
        (lambda at: 15 * at, 10, True),
        (lambda at: 300 * (at > 20), 30, True),
        # Too short to tell.
        (lambda at: 20 * at, 5, False),
    ],
)
def test_memory_that_goes_on_growing_is_a_finding(
    growth: Callable[[float], float], minutes: float, is_finding: bool
) -> None:
    book = Book()
    verdict.memory_is_bounded(book, remembered(growth, minutes))
    assert bool(book.findings.counts) is is_finding, verdict.findings(book)


def test_the_slope_is_per_hour_and_of_the_last_two_thirds() -> None:
    grown = samples(pss_mib=0.5)
    for sample in grown[:20]:
        sample["pss_mib"] = 0
    assert verdict.slope_per_hour(grown, "pss_mib") == pytest.approx(30)


def test_the_image_shows_kills_and_hides_no_peak() -> None:
    many = [{"at_s": float(at), "p99_ms": 5.0} for at in range(5000)]
    many[2500]["p99_ms"] = 900.0
    image = drawing.draw(many, [Mark(9.0, "kill"), Mark(99.0, "fine-tune")], "a < b")
    root = ET.fromstring(image)
    assert len(root.findall(".//*[@stroke='#d01f1f']")) == 1
    (line,) = [line for line in root.findall(".//{*}polyline") if len(line.get("points", "")) > 50]
    heights = [float(point.split(",")[1]) for point in line.get("points", "").split()]
    assert len(heights) < 600
    assert min(heights) < sorted(heights)[1] - 50


@pytest.mark.parametrize(("others", "is_told"), [(1.0, False), (40.0, True)])
def test_a_machine_that_was_not_the_soaks_own_is_told(others: float, is_told: bool) -> None:
    assert ("NOT ALONE" in verdict.machine({"everything": 90.0, "others": others})) is is_told
