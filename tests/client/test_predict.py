"""Any number of images are answered in their order, each on its own."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml import _images, _order
from graftml.testing import Answer, FakeGraft, SentImage

from tests.client.conftest import GUARD_S

CLASSES = [f"class-{number}" for number in range(1000)]


def by_number(_model: str, image: SentImage) -> dict[str, float]:
    """A class that says which image it was."""
    if image.data == b"bad":
        raise graftml.InvalidArgument("not an image", reason=graftml.Reason.IMAGE_UNREADABLE)
    return {f"class-{int(image.data[:4])}": 0.75, "class-0": 0.25}


@pytest.fixture
def server() -> Iterator[FakeGraft]:
    with FakeGraft(predict=by_number) as server:
        server.add_model("numbers", CLASSES)
        yield server


def numbered(count: int) -> list[bytes]:
    return [f"{number:04}".encode() for number in range(1, count + 1)]


def test_many_images_are_split_into_calls_and_keep_their_order(
    client: Any, server: FakeGraft
) -> None:
    answers = client.predict(iter(numbered(600)), "numbers")
    assert [answer.label for answer in answers] == CLASSES[1:601]
    assert [len(request.images) for request in server.requests("Predict")] == [256, 256, 88]


def test_large_images_are_split_by_their_bytes(
    client: Any, server: FakeGraft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_images, "MAX_CALL_BYTES", 10_000)
    images = [
        image + bytes(size)
        for image, size in zip(numbered(5), (4_000, 4_000, 4_000, 20_000, 100), strict=True)
    ]
    assert [answer.label for answer in client.predict(images, "numbers")] == CLASSES[1:6]
    assert [len(request.images) for request in server.requests("Predict")] == [2, 1, 1, 1]


def test_no_images_are_no_call(client: Any, server: FakeGraft) -> None:
    assert client.predict([], "numbers") == []
    assert server.calls == []


def test_a_bad_image_fails_alone(client: Any) -> None:
    good, bad, fine = client.predict([b"0001", b"bad", b"0003"], "numbers")
    assert (good.label, good.error) == ("class-1", None)
    assert (fine.label, fine.probability) == ("class-3", 0.75)
    assert bad.error.reason == graftml.Reason.IMAGE_UNREADABLE
    assert bad.scores == ()


def test_the_best_classes_come_first_and_features_where_asked_for(client: Any) -> None:
    [best] = client.predict(b"0001", "numbers")
    assert [score.label for score in best.scores] == ["class-1"]
    assert best.features == ()
    [two] = client.predict(b"0001", "numbers", top_k=2, include_features=True)
    assert [(s.label, s.probability, s.class_index) for s in two.scores] == [
        ("class-1", 0.75, 1),
        ("class-0", 0.25, 0),
    ]
    assert two.features == tuple(float(byte) for byte in b"0001")
    with pytest.raises(graftml.InvalidArgument, match="top_k is 0"):
        client.predict(b"0001", "numbers", top_k=0)


def test_an_image_unlike_the_training_is_told_apart(connect: Any) -> None:
    scores = {b"like": 0.4, b"edge": 1.0, b"unlike": 2.5, b"unknown": None}

    def scored(_model: str, image: SentImage) -> Answer:
        return Answer({"cat": 1.0}, scores[image.data])

    with FakeGraft(predict=scored) as server:
        server.add_model("pets")
        client = connect(server.target)
        for answers in (
            client.predict(list(scores), "pets"),
            list(client.predict_stream(list(scores), "pets")),
        ):
            found = [(a.out_of_distribution_score, a.is_out_of_distribution) for a in answers]
            assert [is_out for _, is_out in found] == [False, False, True, False]
            assert [score for score, _ in found] == [pytest.approx(0.4), 1.0, 2.5, None]


def test_a_version_is_chosen_by_number_by_alias_or_is_the_newest(
    client: Any, server: FakeGraft
) -> None:
    server.add_model("numbers", CLASSES, versions=2)
    client.set_alias("numbers", "prod", 2)
    answers = [
        client.predict(b"0001", "numbers", **which)[0].version
        for which in ({"version": 1}, {"alias": "prod"}, {})
    ]
    assert answers == [1, 2, 3]
    with pytest.raises(graftml.NotFound) as caught:
        client.predict(b"0001", "numbers", version=9)
    assert caught.value.reason == graftml.Reason.VERSION_NOT_FOUND


def test_a_file_that_is_not_there_is_an_error_of_the_disk(client: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        client.predict(tmp_path / "nope.jpg", "numbers")


def test_a_stream_answers_in_order_though_the_service_does_not(
    client: Any, server: FakeGraft
) -> None:
    answers = list(client.predict_stream(numbered(900), "numbers"))
    assert [answer.label for answer in answers] == CLASSES[1:901]


def test_a_stream_reads_no_further_ahead_than_its_window(client: Any, server: FakeGraft) -> None:
    taken = [0]

    def images() -> Iterator[bytes]:
        for image in numbered(999):
            taken[0] += 1
            yield image

    answers = client.predict_stream(images(), "numbers")
    next(answers)
    # What is under way, what was handed on already, and the request being made.
    window = (_order.REQUESTS_UNDER_WAY + 2) * _order.IMAGES_A_REQUEST + 1
    assert taken[0] <= window
    answers.close()
    assert taken[0] <= window + _order.IMAGES_A_REQUEST


def test_a_stream_that_is_left_leaves_no_thread(server: FakeGraft) -> None:
    senders: set[threading.Thread] = set()

    def images() -> Iterator[bytes]:
        for image in numbered(999):
            senders.add(threading.current_thread())
            yield image

    with graftml.Client(server.target) as client:
        answers = client.predict_stream(images(), "numbers")
        next(answers)
        [sender] = senders
        assert sender is not threading.current_thread()
        answers.close()  # type: ignore[attr-defined]
        sender.join(GUARD_S)
        assert not sender.is_alive()


def test_a_request_that_fails_on_a_stream_gives_its_error_to_each_of_its_images(
    client: Any,
) -> None:
    answers = list(client.predict_stream(numbered(40), "nope"))
    assert len(answers) == 40
    assert {answer.error.reason for answer in answers} == {graftml.Reason.MODEL_NOT_FOUND}


def test_a_stream_whose_images_fail_raises_their_error(client: Any) -> None:
    def images() -> Iterator[bytes]:
        yield from numbered(100)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(client.predict_stream(images(), "numbers"))


def test_several_models_answer_each_in_its_own_list(client: Any, server: FakeGraft) -> None:
    server.add_model("more", CLASSES)
    server.add_model("more", CLASSES)
    never = graftml.Thresholds({}, others=1)
    models = [
        "more",
        graftml.ModelSpec("numbers", decision=never),
        graftml.ModelSpec("more", version=1),
    ]
    more, numbers, before = client.predict_many(numbered(300), models)
    assert [answer.label for answer in more] == CLASSES[1:301]
    assert {answer.model for answer in numbers} == {"numbers"}
    assert {answer.version for answer in more} == {2}
    assert {answer.version for answer in before} == {1}
    # Images times models are what a call is bounded by.
    requests = server.requests("Predict")
    assert [len(request.images) for request in requests] == [85, 85, 85, 45]
    assert requests[0].models[1].decision.thresholds.others == 1


def test_models_that_are_no_list_are_refused_here(client: Any, server: FakeGraft) -> None:
    for models in ("numbers", []):
        with pytest.raises(graftml.InvalidArgument) as refused:
            client.predict_many(b"x", models)
        assert [violation.field for violation in refused.value.violations] == ["models"]
    assert server.calls == []


def test_a_stream_that_breaks_raises_that(client: Any, server: FakeGraft) -> None:
    server.fail("PredictStream", graftml.Unavailable("stopping", reason="SHUTTING_DOWN"), after=1)
    # The asyncio side of gRPC may lose the server's words when it is just writing.
    with pytest.raises(graftml.Unavailable, match=r"stopping|ended the stream"):
        list(client.predict_stream(numbered(900), "numbers"))


def test_the_client_may_be_shared_by_threads(server: FakeGraft) -> None:
    with graftml.Client(server.target) as client:
        answers: dict[int, str] = {}

        def ask(number: int) -> None:
            answers[number] = client.predict(f"{number:04}".encode(), "numbers")[0].label

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 21)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(GUARD_S)
    assert answers == {number: CLASSES[number] for number in range(1, 21)}


def test_calls_ask_for_no_more_scores_than_the_server_gives() -> None:
    for top_k, expected in ((5, [256, 44]), (1000, [100, 100, 100]), (10**6, [1] * 300)):
        specs = _images.model_specs(["m"])
        requests = _images.predict_requests(numbered(300), specs, top_k=top_k)
        assert [len(request.images) for request in requests] == expected
