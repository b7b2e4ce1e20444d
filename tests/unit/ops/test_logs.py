"""Log lines: their shape, and what becomes of gRPC's own."""

import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
from grpc import aio

from service.ops import logs
from service.ops.escaping import escaped
from service.ops.logs import GRPC_LINES_PER_SECOND, set_up_logging


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_carry_the_request_id_and_what_was_given(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging("json", "info")
    logs.request_id.set("abc")
    logging.getLogger("x").info("hello", extra={"job_id": "j1"})
    line = json.loads(capsys.readouterr().err)
    assert (line["message"], line["level"], line["job_id"]) == ("hello", "INFO", "j1")
    assert line["request_id"] == "abc"


@pytest.mark.parametrize("style", ["json", "console"])
def test_lines_say_when_in_utc_and_name_no_call_where_there_is_none(
    style: Literal["json", "console"],
    root_logger: logging.Logger,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.time", lambda: 1_796_000_000.5)
    monkeypatch.setattr("time.time_ns", lambda: 1_796_000_000_500_000_000)
    set_up_logging(style, "info")
    logs.request_id.set("")
    logging.getLogger("x").info("hello")
    line = capsys.readouterr().err
    assert "2026-11-30T00:53:20.500Z" in line
    assert "request_id" not in line


def test_console_lines_are_for_people(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging("console", "info")
    logging.getLogger("x").debug("unseen")
    logging.getLogger("x").info("hello", extra={"job_id": "j1"})
    line = capsys.readouterr().err
    assert "unseen" not in line
    assert "INFO" in line
    assert "hello" in line
    assert "job_id=j1" in line


def test_grpcs_own_lines_lose_what_callers_sent_and_keep_faults(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging("json", "debug")
    grpc = logging.getLogger("grpc._cython.cygrpc")
    try:
        b"Bearer secret\xa0".decode()
    except UnicodeDecodeError:
        grpc.exception("Invalid encoding on %s, %d times", b"Bearer secret\xa0", 3)
    try:
        raise ValueError("a fault of ours")
    except ValueError:
        logging.getLogger("grpc").exception("Unexpected")
    logging.getLogger("grpcx").error("of %s", "another")
    first, second, other = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["message"] == "Invalid encoding on (left out), (left out) times"
    assert "exc_info" not in first
    assert "secret" not in str(first)
    assert "a fault of ours" in second["exc_info"]
    assert other["message"] == "of another"


def test_a_caller_who_left_while_its_answer_was_sent_is_no_error(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging("json", "debug")
    # The second is no caller's doing: gRPC did not take what it was to send.
    for text in (
        'Failed "execute_batch": (SendMessageOperation,)',
        "Failed grpc_call_start_batch: 1",
    ):
        try:
            raise aio.InternalError(text)
        except aio.InternalError:
            logging.getLogger("grpc._cython.cygrpc").exception("ExecuteBatchError raised in core")
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert "grpc_call_start_batch" in line["exc_info"]


def test_what_asyncio_says_of_an_undecodable_path_loses_it_too_and_other_faults_stay(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging("json", "info")
    # As asyncio's handler writes them: all in the message.
    for error in (UnicodeDecodeError("utf-8", b"/x/secret\xa0", 9, 10, "no"), ValueError("ours")):
        logging.getLogger("asyncio").error(
            f"Task exception was never retrieved\nfuture: <Task exception={error!r}>",
            exc_info=error,
        )
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first["message"] == "Task exception was never retrieved"
    assert "secret" not in str(first)
    assert "ours" in second["message"]
    assert "suppressed_before" not in second


def test_a_flood_of_grpcs_own_lines_is_logged_in_part_and_then_summed_up(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [7.0]
    set_up_logging("json", "info", clock=lambda: now[0])
    for _ in range(1000):
        logging.getLogger("grpc.aio").error("again")
        logging.getLogger("x").info("others are not limited")
    now[0] = 8.0
    logging.getLogger("grpc").error("again")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    again = [line["suppressed_before"] for line in lines if line["message"] == "again"]
    assert again == [0] * GRPC_LINES_PER_SECOND + [1000 - GRPC_LINES_PER_SECOND]
    assert len(lines) == len(again) + 1000


@pytest.mark.parametrize("style", ["json", "console"])
def test_names_of_strangers_forge_no_line_and_reach_no_terminal(
    style: Literal["json", "console"],
    root_logger: logging.Logger,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evil = "\x1b]52;c;aGk=\x07\n2026-01-01 00:00:00 ERROR forged\r\x9b31m\u202e\u2028\x7f"
    set_up_logging(style, "info")
    try:
        raise ValueError(evil)
    except ValueError:
        logging.getLogger("x").exception("no %s", evil, extra={"name_of_file": evil})
    lines = capsys.readouterr().err.split("\n")
    assert all(escaped(line) == line for line in lines)
    assert sum(line.startswith(("{", "20")) for line in lines) == 1
