"""What a test can tell the fake server: answers, failures, delays."""

from typing import Any

import graftml
import pytest
from graftml.testing import FakeGraft
from graftml_stubs.v1 import fine_tuning_pb2, model_pb2

GONE = graftml.NotFound("gone", reason=graftml.Reason.MODEL_NOT_FOUND)


def test_a_call_answers_what_it_is_given(client: Any, server: FakeGraft) -> None:
    server.answer("GetModel", model_pb2.GetModelResponse(model=model_pb2.Model(name="given")))
    assert client.get_model("pets").name == "given"
    server.answer(
        "GetModel",
        lambda request: model_pb2.GetModelResponse(model=model_pb2.Model(name=request.model)),
    )
    assert client.get_model("asked").name == "asked"


def test_a_stream_answers_what_it_is_given(client: Any, server: FakeGraft) -> None:
    job = client.fine_tune(graftml.ServerPath("/images"), "pets")
    job.wait()
    events = [fine_tuning_pb2.JobEvent(sequence=number) for number in range(1, 10)]
    server.answer("WatchJob", [fine_tuning_pb2.WatchJobResponse(event=event) for event in events])
    assert [event.sequence for event in job.events()] == list(range(1, 10))


def test_an_upload_is_answered_by_what_was_sent(client: Any, server: FakeGraft) -> None:
    def refused(sent: list[Any]) -> None:
        raise graftml.InvalidArgument(f"{len(sent)} messages", reason="DATASET_UNUSABLE")

    server.answer("UploadDataset", refused)
    with pytest.raises(graftml.InvalidArgument, match="4 messages"):
        client.upload_dataset([("cat", b"1"), ("dog", b"2")])


def test_calls_fail_as_often_as_they_are_told_and_late(client: Any, server: FakeGraft) -> None:
    server.add_model("pets")
    server.fail("GetModel", GONE, times=2, delay_s=0.01)
    for _ in range(2):
        with pytest.raises(graftml.NotFound, match="gone"):
            client.get_model("pets")
    server.fail("GetModel", None, delay_s=0.01)
    assert client.get_model("pets").name == "pets"
    # As long as the server lives: a delay ends with it.
    server.fail("GetModel", None, delay_s=3600)
    with pytest.raises(graftml.DeadlineExceeded):
        client.with_timeout(0.1).get_model("pets")
    assert client.get_model("pets").name == "pets"
