"""Errors say what was wrong: for programs by class and reason, for people by message."""

import threading
from typing import Any

import graftml
import grpc
import pytest
from google.rpc import status_pb2
from graftml import errors
from graftml.testing import FakeGraft
from graftml.testing._refusals import to_status
from graftml_stubs.v1 import error_reason_pb2

from tests.client.conftest import GUARD_S

PREFIX = "ERROR_REASON_"


def test_the_clients_reasons_are_the_contracts() -> None:
    names = {name.removeprefix(PREFIX) for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert set(graftml.Reason) == names - {"UNSPECIFIED"}


@pytest.mark.parametrize("code", [c for c in grpc.StatusCode if c is not grpc.StatusCode.OK])
def test_every_status_code_becomes_an_error_with_that_code(code: grpc.StatusCode) -> None:
    error = errors.from_status(status_pb2.Status(code=code.value[0], message="why"))
    assert (error.code, error.message) == (code, "why")


def test_all_details_of_an_error_arrive(client: Any, server: FakeGraft) -> None:
    sent = graftml.ResourceExhausted(
        "too much at once",
        reason="A_REASON_OF_TOMORROW",
        violations=(graftml.Violation("images[3]", "too many"),),
        retry_after_s=3600.0,
    )
    server.fail("GetModel", sent)
    with pytest.raises(graftml.ResourceExhausted, match="too much at once") as caught:
        client.get_model("pets")
    got = caught.value
    assert (got.reason, got.violations, got.retry_after_s) == (
        sent.reason,
        sent.violations,
        sent.retry_after_s,
    )


def test_an_error_that_the_service_answers_with_has_its_class(client: Any) -> None:
    with pytest.raises(graftml.NotFound) as caught:
        client.get_model("nope")
    assert caught.value.reason == graftml.Reason.MODEL_NOT_FOUND
    assert "nope" in caught.value.message


def test_details_of_another_domain_are_no_reason() -> None:
    status = to_status(graftml.NotFound("why", reason="THEIRS"))
    foreign = status.details[0].value.replace(b"graft", b"other")
    status.details[0].value = foreign
    assert errors.from_status(status).reason == ""


def test_a_server_that_is_not_there_is_called_by_its_address(connect: Any) -> None:
    with FakeGraft() as gone:
        target = gone.target
    with pytest.raises(graftml.CannotConnect) as caught:
        connect(target).get_model("pets")
    assert caught.value.message.startswith(f"nothing listens at {target}: is the server running")
    assert isinstance(caught.value, ConnectionError)


def test_a_name_that_cannot_be_resolved_is_said_to_be_so(connect: Any) -> None:
    with pytest.raises(graftml.CannotConnect, match="cannot be resolved"):
        connect("nowhere.invalid:50051", retry=graftml.NO_RETRY).get_model("pets")


def test_a_plain_server_spoken_to_with_tls_is_said_to_be_so(
    connect: Any, server: FakeGraft
) -> None:
    client = connect(
        server.target, credentials=grpc.ssl_channel_credentials(), retry=graftml.NO_RETRY
    )
    with pytest.raises(graftml.CannotConnect, match="TLS"):
        client.get_model("pets")


def test_an_answer_that_takes_too_long_is_a_timeout_that_names_the_time(connect: Any) -> None:
    answered = threading.Event()

    def slow(_model: str, _image: Any) -> dict[str, float]:
        answered.wait(GUARD_S)
        return {"cat": 1.0}

    with FakeGraft(predict=slow) as server:
        server.add_model("pets")
        with pytest.raises(graftml.DeadlineExceeded, match=r"within 0\.1 s") as caught:
            connect(server.target).with_timeout(0.1).predict(b"x", "pets")
        answered.set()
    assert isinstance(caught.value, TimeoutError)


def test_a_server_of_another_kind_is_said_to_be_so(connect: Any, server: FakeGraft) -> None:
    server.fail("GetModel", graftml.Unimplemented("Method not found!"))
    with pytest.raises(graftml.Unimplemented, match="not a Graft server, or an older one"):
        connect(server.target).get_model("pets")


def test_a_prediction_that_failed_raises_when_it_is_read() -> None:
    error = graftml.InvalidArgument("not an image")
    failed = graftml.Prediction("pets", 1, error=error)
    with pytest.raises(graftml.InvalidArgument, match="not an image"):
        _ = failed.label
    with pytest.raises(graftml.InvalidArgument, match="not an image"):
        _ = failed.probability
