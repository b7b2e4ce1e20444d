"""The soak stays a program that works, and one that finds what is wrong."""

import json
import random
import re
import signal
import subprocess
import sys
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

from bench.serve.load import classifies
from bench.soak import verdict
from bench.soak.__main__ import on_signals
from bench.soak.book import OK, Book
from bench.soak.server import Sample, Tenant, read_log

ROOT = Path(__file__).parents[2]
GUARD_S = 600.0
"""After which a soak that does not end is broken."""

CALLS = ("FineTune | ok", "DatasetService/UploadDataset | CANCELLED", "no token | TOKEN_MISSING")
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
    options = "--module bench.instant --capacity 0.3 --max-rate 60 --faster 10"
    return [
        *(sys.executable, "-m", "bench.soak", str(tmp_path / "photos")),
        *("--out", str(tmp_path / "soak.md"), *options.split()),
        *("--flags", "threads=1", "warm-trainers=0", *unhurried, "drain-s=80"),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_signal_tells_a_soak_to_end(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    told: list[int] = []
    try:
        on_signals(lambda got, _frame: told.append(got))
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
    assert "findings: " in (tmp_path / "soak.md").read_text()


def found(text: str) -> set[str]:
    """The kinds of findings that a report tells."""
    kinds = set(re.findall(r"^- \d+ x (.+)$", text, re.MULTILINE))
    assert bool(kinds) != ("findings: none" in text)
    return kinds


@pytest.mark.e2e
def test_a_short_soak_finds_nothing_and_ends_well(command: list[str], tmp_path: Path) -> None:
    for minutes in (0.15, 0.6, 4.0):
        done = subprocess.run(
            [*command, f"--minutes={minutes}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
        )
        text = (tmp_path / "soak.md").read_text()
        kinds = found(text)
        assert kinds <= OF_SPEED, done.stdout + done.stderr
        assert done.returncode == (1 if kinds else 0), done.stdout + done.stderr
        missing = [call for call in CALLS if call not in text]
        # Where others have all the cores seconds are too short for all of it.
        if not kinds and not missing:
            break
    assert not kinds
    assert not missing


def test_a_call_that_fails_and_should_not_is_a_finding_and_marked() -> None:
    book = Book()
    error = NotFound("gone", reason="MODEL_NOT_FOUND", code=grpc.StatusCode.NOT_FOUND)

    def fail() -> None:
        raise error

    assert book.call("Predict", OK, fail) is None
    assert book.findings == {"Predict answered MODEL_NOT_FOUND": 1}
    text = verdict.report(book, [], {})
    assert "| Predict | MODEL_NOT_FOUND **!** | 1 |" in text
    assert "gone" in text


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
    assert not book.findings


def test_a_call_that_succeeds_and_must_not_is_a_finding() -> None:
    book = Book()
    book.call("A wrong token", "TOKEN_UNKNOWN", lambda: 1)
    assert book.findings == {"A wrong token answered ok": 1}


def test_what_a_thread_dies_of_is_a_finding() -> None:
    book = Book()
    with book.at_work("the tuner"):
        raise RuntimeError("no")
    assert book.findings == {"the tuner died": 1}


def test_samples_of_findings_are_bounded() -> None:
    book = Book()
    for number in range(1000):
        book.find("a job was lost", str(number))
    assert book.findings.total() == 1000
    assert len(book.samples["a job was lost"]) < 10


def test_a_job_is_killed_once_and_only_while_it_is_under_way() -> None:
    book = Book()
    for job in ("one", "two"):
        book.job_started(job, "acme")
    assert book.may_kill("one")
    book.jobs["one"].is_killed = True
    book.job_ended("two", "SUCCEEDED", 1)
    assert not any(book.may_kill(job) for job in ("one", "two", "unknown", ""))


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
    assert bool(book.findings) is is_finding


@pytest.mark.parametrize(
    ("code", "complaints", "findings"),
    [(0, {}, 0), (1, {}, 1), (0, {"unexpected error 1234": 1}, 1)],
)
def test_a_server_that_ends_badly_or_complains_is_a_finding(
    code: int, complaints: dict[str, int], findings: int
) -> None:
    book = Book()
    verdict.server_ended_well(book, code, Counter(complaints), Counter())
    assert book.findings.total() == findings


BY_ITSELF = "a trainer crashed by itself"
AGAIN = "a job was tried again without a kill"
NOT_AGAIN = "a killed job was not tried again"


@pytest.mark.parametrize(
    ("is_killed", "spared", "attempts", "crashes", "findings"),
    [
        (False, "", 1, 0, set()),
        (True, "", 2, 1, set()),
        (False, "", 2, 1, {BY_ITSELF, AGAIN}),
        (True, "", 3, 2, {BY_ITSELF, NOT_AGAIN}),
        (False, "", 2, 0, {AGAIN}),
        (True, "", 1, 0, {NOT_AGAIN}),
        (True, "had_result", 1, 0, set()),
        (True, "is_cancelled", 1, 0, set()),
    ],
)
def test_kills_alone_excuse_crashes_and_must_be_borne(
    is_killed: bool, spared: str, attempts: int, crashes: int, findings: set[str]
) -> None:
    book = Book()
    book.job_started("job", "acme")
    book.job_ended("job", "SUCCEEDED", attempts)
    book.jobs["job"].is_killed = is_killed
    if spared:
        setattr(book.jobs["job"], spared, True)
    verdict.server_ended_well(book, 0, Counter(), Counter({"job": crashes} if crashes else {}))
    assert set(book.findings) == findings


def test_crashes_are_read_from_the_log_with_their_jobs_and_are_no_complaints(
    tmp_path: Path,
) -> None:
    lines = [
        {"level": "ERROR", "message": "the trainer crashed (-9): words\nmore", "job_id": "job"},
        {"level": "WARNING", "message": "a waiting trainer had died: words"},
        {"level": "WARNING", "message": "slow"},
        {"level": "ERROR", "message": "unexpected error 1234"},
    ]
    log = tmp_path / "service.log"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + "Traceback\n")
    complaints, crashes = read_log(log)
    assert crashes == {"job": 1}
    assert set(complaints) == {
        "a waiting trainer had died: words", "unexpected error 1234", "Traceback",
    }  # fmt: skip


def answered(label: str, model: str = "stable") -> prediction_pb2.PredictResponse:
    score = prediction_pb2.ClassScore(label=label)
    result = prediction_pb2.ImageResult(
        classification=prediction_pb2.Classification(scores=[score])
    )
    answer = prediction_pb2.ModelAnswer(model=model, results=[result])
    return prediction_pb2.PredictResponse(answers=[answer])


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (answered("acme-ants"), True),
        (answered("globex-ants"), False),
        (
            prediction_pb2.PredictResponse(answers=[prediction_pb2.ModelAnswer(model="stable")]),
            False,
        ),
    ],
)
def test_an_answer_to_the_load_has_one_of_the_models_own_classes(
    answer: prediction_pb2.PredictResponse, is_right: bool
) -> None:
    assert classifies(answer.SerializeToString(), "acme-") is is_right


@pytest.mark.parametrize(
    ("labels", "owns"), [(["acme-a", "acme-b"], True), (["acme-a", "globex-a"], False), ([], False)]
)
def test_a_tenant_knows_its_own_labels(labels: list[str], owns: bool) -> None:
    assert Tenant("acme", "", "").owns(labels) is owns


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
    verdict.nothing_is_lost(client, book, Tenant("globex", "", ""))
    assert not book.findings
    verdict.nothing_is_lost(client, book, verdict.Tenant("acme", "", ""))
    assert book.findings == {"a job was lost": 1, "a version was lost": 1}


@pytest.mark.parametrize(("refused", "is_finding"), [(5, False), (50, True)])
def test_rare_refusals_of_the_steady_load_are_none(refused: int, is_finding: bool) -> None:
    book = Book()
    outcomes = {"ok": 1000, "refused": refused, "expired": 0, "other": 0}
    verdict.load_is_carried(book, {"outcomes": outcomes, "codes": {}})
    assert bool(book.findings) is is_finding


def test_a_wrong_answer_to_the_steady_load_is_a_finding() -> None:
    book = Book()
    outcomes = {"ok": 1000, "refused": 0, "expired": 0, "other": 1}
    verdict.load_is_carried(book, {"outcomes": outcomes, "codes": {"WRONG_ANSWER": 1}})
    assert book.findings == {"the steady load was answered wrongly": 1}


@pytest.mark.parametrize(
    ("descriptors", "threads", "count"), [(0, 0, 0), (120, 0, 1), (0, 60, 1), (30, 15, 0)]
)
def test_what_piles_up_is_a_finding(descriptors: int, threads: int, count: int) -> None:
    book = Book()
    verdict.nothing_piles_up(
        book, [Sample(0, 200, 30, 20), Sample(60, 200, 30 + descriptors, 20 + threads)]
    )
    assert book.findings.total() == count


def remembered(growth: Callable[[float], float], minutes: float) -> list[Sample]:
    """The memory of a healthy server, which jobs and exports move by 40 MiB, and a growth."""
    draw = random.Random(4)
    return [
        Sample(at, 270 + draw.uniform(0, 40) + growth(at / 60), 30, 20)
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
    verdict.nothing_piles_up(book, remembered(growth, minutes))
    assert bool(book.findings) is is_finding, book.samples
