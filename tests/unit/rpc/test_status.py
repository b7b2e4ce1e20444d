"""Statuses carry the code of their reason's kind, whoever raised the error."""

from base64 import b64encode
from urllib.parse import quote

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

from service.errors import KINDS, InvalidInput, Reason
from service.rpc import status


@pytest.mark.parametrize("reason", Reason)
def test_a_failed_job_and_a_call_of_one_reason_have_the_same_code(reason: Reason) -> None:
    error = KINDS[reason](reason, "why", field="model", retry_after_s=1.0)
    job, call = status.of_reason(reason, "why"), status.from_error(error)
    assert job.code == call.code == code_pb2.Code.Value(KINDS[reason].code)
    assert status.code_of(job) is grpc.StatusCode[KINDS[reason].code]
    info = error_details_pb2.ErrorInfo()
    assert job.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("graft", reason.value)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.INTERNAL, code_pb2.INTERNAL),
        (Reason.PATH_NOT_ALLOWED, code_pb2.PERMISSION_DENIED),
        (Reason.STORAGE_BUSY, code_pb2.UNAVAILABLE),
        (Reason.STORAGE_DAMAGED, code_pb2.DATA_LOSS),
        (Reason.MODEL_UNLOADABLE, code_pb2.DATA_LOSS),
        (Reason.SHUTTING_DOWN, code_pb2.UNAVAILABLE),
    ],
)
def test_jobs_that_fail_for_the_services_own_reasons_say_so(reason: Reason, code: int) -> None:
    assert status.of_reason(reason, "why").code == code


@pytest.mark.parametrize("letter", ["a", "\u00e4", "\U0001f600"])
def test_a_long_text_is_shortened_to_what_clients_take(letter: str) -> None:
    sent = status.from_error(InvalidInput(Reason.INVALID_FIELD, letter * 50_000, field="model"))
    text = quote(sent.message)
    assert len(text) + len(b64encode(sent.SerializeToString())) < 8000
    assert sent.message.lstrip(letter) == "..."
    assert len(sent.message.encode()) > 1200
