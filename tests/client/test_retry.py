"""Tried again is what is safe and may pass; never beyond the deadline or the count."""

from pathlib import Path
from typing import Any

import graftml
import pytest
from google.protobuf.message_factory import GetMessageClass
from graftml._rpcs import METHODS, is_safe
from graftml.retry import Attempts
from graftml.testing import FakeGraft


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


POLICY = graftml.RetryPolicy(initial_delay_s=1.0, max_delay_s=4.0, max_attempts=5)
BROKEN = graftml.Unavailable("gone")


def test_pauses_grow_to_a_bound_and_are_spread() -> None:
    steps = [1.0, 2.0, 4.0, 4.0]
    assert [POLICY.backoff_s(n, 1.0, None) for n in (1, 2, 3, 4)] == steps
    assert [POLICY.backoff_s(n, 0.0, None) for n in (1, 2, 3, 4)] == [s / 2 for s in steps]
    assert POLICY.backoff_s(10_000, 1.0, None) == 4.0


def test_the_service_is_never_asked_before_it_said() -> None:
    assert POLICY.backoff_s(1, 0.0, 10.0) == 10.5


def test_the_last_error_is_raised_when_the_attempts_are_used_up() -> None:
    attempts = Attempts(POLICY, is_safe=True, timeout_s=1000)
    for _ in range(4):
        attempts.pause_s(graftml.Unavailable("earlier"))
    with pytest.raises(graftml.Unavailable) as caught:
        attempts.pause_s(BROKEN)
    assert caught.value is BROKEN


def test_no_pause_reaches_beyond_the_deadline() -> None:
    clock = Clock()
    attempts = Attempts(POLICY, is_safe=True, timeout_s=5.0, clock=clock, jitter=lambda: 1.0)
    assert attempts.pause_s(BROKEN) == 1.0
    clock.now += 3.5
    assert attempts.remaining_s == 1.5
    with pytest.raises(graftml.Unavailable):
        attempts.pause_s(BROKEN)


def test_a_wait_that_the_service_asks_for_beyond_the_deadline_is_not_waited() -> None:
    attempts = Attempts(POLICY, is_safe=True, timeout_s=5.0)
    with pytest.raises(graftml.ResourceExhausted):
        attempts.pause_s(graftml.ResourceExhausted("full", retry_after_s=60.0))


@pytest.mark.parametrize(
    "error",
    [
        graftml.InvalidArgument("wrong"),
        graftml.Internal("broken"),
        graftml.DeadlineExceeded("late"),
        graftml.ResourceExhausted("the message is too large"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(error: graftml.GraftError) -> None:
    with pytest.raises(type(error)):
        Attempts(POLICY, is_safe=True, timeout_s=1000).pause_s(error)


@pytest.mark.parametrize(
    "wrong", [{"max_attempts": 0}, {"initial_delay_s": 0}, {"max_delay_s": 0.1}, {"multiplier": 0}]
)
def test_a_policy_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(graftml.InvalidArgument):
        graftml.RetryPolicy(**wrong)


@pytest.mark.parametrize(
    "error", [BROKEN, graftml.ResourceExhausted("full", reason="QUEUE_FULL", retry_after_s=0.001)]
)
def test_a_safe_call_that_fails_twice_in_passing_succeeds(
    client: Any, server: FakeGraft, error: graftml.GraftError
) -> None:
    server.add_model("pets")
    server.fail("GetModel", error, times=2)
    assert client.get_model("pets").name == "pets"
    assert len(server.requests("GetModel")) == 3


def test_a_call_that_keeps_failing_is_given_up_with_the_services_error(
    client: Any, server: FakeGraft
) -> None:
    server.fail("GetModel", graftml.Unavailable("stopping", reason="SHUTTING_DOWN"), times=9)
    with pytest.raises(graftml.Unavailable) as caught:
        client.get_model("pets")
    assert caught.value.reason == graftml.Reason.SHUTTING_DOWN
    assert len(server.requests("GetModel")) == 4


UNSAFE = {
    "DeleteJob": lambda client: client.delete_job("job-1"),
    "CancelJob": lambda c: c.cancel_job("job-1"),
    "DeleteDataset": lambda c: c.delete_dataset("ds-1"),
    "DeleteBackbone": lambda c: c.delete_backbone("onnx/tiny"),
    "DeleteModel": lambda c: c.delete_model("pets"),
    "DeleteVersion": lambda c: c.delete_version("pets", 1),
    "SetAlias": lambda c: c.set_alias("pets", "prod", 1),
    "DeleteAlias": lambda c: c.delete_alias("pets", "prod"),
    "RollbackAlias": lambda c: c.rollback_alias("pets"),
    "PromoteVersion": lambda c: c.promote_version("pets", 1),
    "PredictStream": lambda c: list(c.predict_stream([b"x"], "pets")),
}


IDS = {name: {"request_id": "once"} for name in ("FineTune", "RankBackbones")}
"""By which a repeat is known; the client always sends one."""


def test_the_calls_that_are_not_safe_are_these() -> None:
    unsafe = {
        method.name
        for method in METHODS.values()
        if not is_safe(GetMessageClass(method.input_type)(**IDS.get(method.name, {})))
    }
    # Safe, but what was sent on a broken stream is not kept to send it again.
    assert unsafe | {"PredictStream"} == set(UNSAFE)


@pytest.mark.parametrize("method", UNSAFE)
def test_an_unsafe_call_is_made_once(client: Any, server: FakeGraft, method: str) -> None:
    server.add_model("pets", versions=2)
    server.fail(method, BROKEN)
    with pytest.raises(graftml.Unavailable):
        UNSAFE[method](client)
    assert [call.method for call in server.calls].count(method) == 1


def test_a_fine_tune_that_is_tried_again_starts_one_job(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    server.fail("FineTune", BROKEN, times=2)
    client.fine_tune(folder, "pets")
    ids = {request.request_id for request in server.requests("FineTune")}
    assert [r.validate_only for r in server.requests("FineTune")] == [True, True, True, False]
    assert len(ids) == 1
    assert len(list(client.list_jobs())) == 1


def test_a_folders_upload_that_breaks_is_sent_again_whole(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    server.fail("UploadDataset", BROKEN)
    assert client.upload_dataset(folder).image_count == 6


def test_an_upload_that_cannot_begin_again_is_made_once(client: Any, server: FakeGraft) -> None:
    server.fail("UploadDataset", BROKEN)
    once = ((label, b"x") for label in ("cat", "dog"))
    with pytest.raises(graftml.Unavailable):
        client.upload_dataset(once)
    assert [call.method for call in server.calls] == ["UploadDataset"]


def test_an_export_that_breaks_begins_again_and_leaves_one_whole_file(
    client: Any, server: FakeGraft, tmp_path: Path
) -> None:
    server.add_model("pets")
    server.fail("ExportModel", BROKEN, after=2)
    path = client.export_model("pets", tmp_path / "pets.onnx")
    assert path.read_bytes() == b"fake onnx of pets 1\n" * 200
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_that_fails_leaves_the_file_that_was_there(
    client: Any, server: FakeGraft, tmp_path: Path
) -> None:
    path = tmp_path / "pets.onnx"
    path.write_text("of yesterday")
    server.add_model("pets")
    server.fail("ExportModel", graftml.DataLoss("damaged"), after=2)
    with pytest.raises(graftml.DataLoss):
        client.export_model("pets", path)
    assert path.read_text() == "of yesterday"
    assert list(tmp_path.iterdir()) == [path]


def test_a_client_without_retries_tries_once(connect: Any, server: FakeGraft) -> None:
    server.add_model("pets")
    server.fail("GetModel", BROKEN)
    with pytest.raises(graftml.Unavailable):
        connect(server.target, retry=graftml.NO_RETRY).get_model("pets")
    assert len(server.requests("GetModel")) == 1


def test_a_fine_tune_on_what_is_there_is_tried_again_and_starts_one_job(
    client: Any, server: FakeGraft
) -> None:
    server.fail("FineTune", BROKEN, times=2)
    client.fine_tune(graftml.ServerPath("/x"), "pets")
    sent = server.requests("FineTune")
    assert [request.validate_only for request in sent] == [False] * 3
    assert len({request.request_id for request in sent}) == 1
    assert len(list(client.list_jobs())) == 1
