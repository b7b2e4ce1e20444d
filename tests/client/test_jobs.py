"""A job is followed to its end: across lost connections, nothing missed, nothing doubled."""

import threading
from typing import Any

import graftml
import pytest
from graftml import _answers
from graftml._watch import Watch
from graftml.cli._watching import describe
from graftml.testing import (
    DEFAULT_SCRIPT,
    FakeGraft,
    epoch,
    failed,
    note,
    progress,
    published,
    requeued,
    running,
    succeeded,
)
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from tests.client.conftest import GUARD_S

DATA = graftml.ServerPath("/images")
EVENTS = len(DEFAULT_SCRIPT) + 1
"""The script and the QUEUED before it."""
BROKEN = graftml.Unavailable("gone")


def test_waiting_for_a_job_returns_its_version_and_tells_every_event(
    client: Any, server: FakeGraft
) -> None:
    told: list[graftml.JobEvent] = []
    version = client.fine_tune(DATA, "pets", labels={"a": "b"}).wait(on_event=told.append)
    assert (version.version, version.labels, version.aliases) == (1, {"a": "b"}, ("latest",))
    assert [event.sequence for event in told] == list(range(1, EVENTS + 1))
    assert [type(event.payload).__name__ for event in told] == [
        "StateChanged",
        "StateChanged",
        "DataSummary",
        "Progress",
        "EpochMetrics",
        "EpochMetrics",
        "Progress",
        "VersionPublished",
        "StateChanged",
    ]
    assert all(event.time is not None and event.time.tzinfo is not None for event in told)


def test_a_job_that_fails_raises_with_the_jobs_reason(connect: Any) -> None:
    script = [running(), failed("one class only", graftml.Reason.DATASET_UNUSABLE)]
    with FakeGraft(script=script) as server, pytest.raises(graftml.JobFailed) as caught:
        connect(server.target).fine_tune(DATA, "pets").wait()
    assert caught.value.reason == graftml.Reason.DATASET_UNUSABLE
    assert caught.value.message == "job job-1 of model pets failed: one class only"
    assert caught.value.job.state == graftml.JobState.FAILED


def test_waiting_for_a_job_that_is_cancelled_raises_that(connect: Any) -> None:
    with FakeGraft(script=[running()]) as server:
        job = connect(server.target).fine_tune(DATA, "pets")
        job.cancel()
        with pytest.raises(graftml.JobCancelled, match="job-1"):
            job.wait()


def test_waiting_ends_with_its_time_and_the_job_goes_on(connect: Any) -> None:
    with FakeGraft(script=[running()]) as server:
        job = connect(server.target).fine_tune(DATA, "pets")
        with pytest.raises(graftml.DeadlineExceeded, match=r"did not end within 0\.1 s"):
            job.wait(timeout_s=0.1)
        assert job.refresh().state == graftml.JobState.RUNNING


@pytest.mark.parametrize("after", range(EVENTS + 1))
def test_a_stream_that_breaks_anywhere_is_taken_up_where_it_broke(
    client: Any, server: FakeGraft, after: int
) -> None:
    job = client.fine_tune(DATA, "pets")
    server.fail("WatchJob", BROKEN, after=after)
    sequences = [event.sequence for event in job.events()]
    assert sequences == list(range(1, EVENTS + 1))
    asked = [request.after_sequence for request in server.requests("WatchJob")]
    assert asked == [0, after]


def test_a_stream_that_breaks_after_every_event_is_followed_to_its_end(
    client: Any, server: FakeGraft
) -> None:
    job = client.fine_tune(DATA, "pets")
    server.fail("WatchJob", BROKEN, after=1, times=EVENTS)
    assert [event.sequence for event in job.events()] == list(range(1, EVENTS + 1))


def test_events_are_told_from_a_number_on(client: Any, server: FakeGraft) -> None:
    job = client.fine_tune(DATA, "pets")
    assert [event.sequence for event in job.events(after=EVENTS - 2)] == [EVENTS - 1, EVENTS]
    assert list(job.events(after=EVENTS)) == []


def test_a_handle_is_made_of_an_id(client: Any, server: FakeGraft) -> None:
    started = client.fine_tune(DATA, "pets")
    assert client.job(started.job_id).wait().job_id == started.job_id
    with pytest.raises(graftml.NotFound):
        client.job("job-99")


def test_a_job_that_is_gone_is_not_waited_for(client: Any) -> None:
    with pytest.raises(graftml.NotFound):
        list(client.watch_job("job-99"))


def test_a_servers_restart_is_lived_through() -> None:
    server = FakeGraft(script=[running()])
    server.start()
    try:
        policy = graftml.RetryPolicy(initial_delay_s=0.01, max_delay_s=0.1, reconnect_for_s=GUARD_S)
        with graftml.Client(server.target, retry=policy) as client:
            job = client.fine_tune(DATA, "pets")
            seen, first_two = list[int](), threading.Event()

            def note_down(event: graftml.JobEvent) -> None:
                seen.append(event.sequence)
                if len(seen) == 2:
                    first_two.set()

            def restart() -> None:
                first_two.wait(GUARD_S)
                server.stop()
                server.start()
                server.play(job.job_id, requeued(), running(), published(), succeeded())

            restarting = threading.Thread(target=restart)
            restarting.start()
            assert job.wait(timeout_s=GUARD_S, on_event=note_down).version == 1
            restarting.join(GUARD_S)
            assert seen == [1, 2, 3, 4, 5, 6]
            assert client.get_job(job.job_id).attempts == 2
    finally:
        server.stop()


def test_leaving_an_iteration_ends_its_call() -> None:
    with FakeGraft(script=[running()]) as server, graftml.Client(server.target) as client:
        events = client.fine_tune(DATA, "pets").events()
        next(events)
        events.close()  # type: ignore[attr-defined]
        assert [call.method for call in server.calls] == ["FineTune", "WatchJob"]


def test_a_running_job_tells_how_far_it_is(connect: Any) -> None:
    script = [running(), progress("training", 0.25, "epoch 1")]
    with FakeGraft(script=script) as server:
        job = connect(server.target).fine_tune(DATA, "pets").refresh()
    assert job.progress == graftml.Progress("training", 0.25, "epoch 1")
    assert job.start_time is not None
    assert job.end_time is None
    assert job.version is None


def test_figures_and_notes_arrive_as_they_were(connect: Any) -> None:
    script = [running(), epoch(1, 4, accuracy=0.5, loss=2.0), note("few images", warning=True)]
    with FakeGraft(script=script) as server:
        job = connect(server.target).fine_tune(DATA, "pets")
        events = job.events(after=2)
        figures, words = next(events).payload, next(events).payload
        events.close()
    assert (figures.epoch, figures.epochs, figures.eta_s) == (1, 4, 3.0)
    assert (figures.validation_loss, figures.validation_accuracy) == (2.0, 0.5)
    assert words == graftml.Note("warning", "few images")


def test_an_event_of_tomorrow_does_not_stop_a_client_of_today() -> None:
    watch = Watch("job-1", 0, None, graftml.RetryPolicy())
    event = watch.take(pb.WatchJobResponse(event=pb.JobEvent(sequence=1)))
    assert event is not None
    assert event.payload == graftml.Unknown()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watching(clock: Clock, timeout_s: float | None = None) -> Watch:
    policy = graftml.RetryPolicy(initial_delay_s=1.0, max_delay_s=4.0, reconnect_for_s=20.0)
    return Watch("job-1", 0, timeout_s, policy, clock=clock, jitter=lambda: 1.0)


def test_a_server_that_does_not_come_back_is_given_up() -> None:
    clock = Clock()
    watch = watching(clock)
    for pause_s in (1.0, 2.0, 4.0, 4.0, 4.0, 4.0):
        watch.request()
        assert watch.pause_s(BROKEN) == pause_s
        clock.now += pause_s
    watch.request()
    with pytest.raises(graftml.Unavailable):
        watch.pause_s(BROKEN)


def test_a_stream_that_was_silent_for_long_was_healthy_until_it_broke() -> None:
    clock = Clock()
    watch = watching(clock)
    for _ in range(5):
        watch.request()
        clock.now += 300.0
        assert watch.pause_s(BROKEN) == 1.0


def test_an_event_that_comes_twice_is_told_once() -> None:
    watch = watching(Clock())
    answer = pb.WatchJobResponse(event=pb.JobEvent(sequence=1))
    assert watch.take(answer) is not None
    assert watch.take(answer) is None
    assert watch.request().after_sequence == 1


def test_a_silent_stream_is_opened_anew_until_the_watchers_own_time_is_over() -> None:
    clock = Clock()
    watch = watching(clock, timeout_s=1000.0)
    assert watch.remaining_s == 600.0
    clock.now += 600.0
    assert watch.pause_s(graftml.DeadlineExceeded("silent")) == 0.0
    assert watch.remaining_s == 400.0
    clock.now += 400.0
    with pytest.raises(graftml.DeadlineExceeded, match="did not end within 1000 s"):
        _ = watch.remaining_s


def test_an_epoch_without_held_out_images_has_no_figures_of_them() -> None:
    event = pb.JobEvent(epoch=pb.EpochMetrics(epoch=1, epochs=2, train_loss=0.5))
    epoch = _answers.event(event).payload
    assert isinstance(epoch, graftml.EpochMetrics)
    assert (epoch.validation_loss, epoch.validation_accuracy) == (None, None)
    assert describe(epoch) == "epoch 1/2: loss 0.500, accuracy 0.0%, as trained"
