"""Decisions from a caller's hands to the service, and answers by them; the command's options."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml import _answers, _requests
from graftml.cli import main
from graftml.testing import Answer, FakeGraft, SentImage
from graftml_stubs.v1 import decision_pb2, model_pb2

SURE = graftml.Thresholds({"cat": 0.9, "dog": 0.25}, others=0.5)
DECISIONS: list[Any] = ["argmax", "balanced", SURE, graftml.Thresholds(others=0.0)]


DECIDED = {"pets": None, "sure": "dog", "unsure": ""}
"""Models, and what they answer by the decision that they are asked for."""


def shares(model: str, _image: SentImage) -> Answer:
    return Answer({"cat": 0.5, "dog": 0.25, "fox": 0.25}, label=DECIDED[model])


@pytest.fixture
def server() -> Iterator[FakeGraft]:
    with FakeGraft(predict=shares) as server:
        for model in DECIDED:
            server.add_model(model, ["cat", "dog", "fox"])
        yield server


def decisions_of(server: FakeGraft) -> list[decision_pb2.Decision]:
    return [request.models[0].decision for request in server.requests("Predict")]


@pytest.mark.parametrize("decision", DECISIONS, ids=str)
def test_what_is_read_of_a_decision_is_what_was_put_into_it(decision: Any) -> None:
    version = model_pb2.Version(decision=_requests.decision(decision))
    assert _answers.version(version).decision == decision


def test_no_decision_is_the_servers_and_one_of_a_newer_server_is_unknown() -> None:
    request = _requests.fine_tune("ds-1", "pets", {})
    assert not request.HasField("decision")
    newer = model_pb2.Version(decision=decision_pb2.Decision())
    assert _answers.version(newer).decision == "unknown"


def test_a_call_says_how_it_is_to_be_answered(client: Any, server: FakeGraft) -> None:
    [plain] = client.predict(b"image", "pets")
    assert (plain.label, plain.probability) == ("cat", 0.5)
    [next_best] = client.predict(b"image", "sure", decision=SURE)
    assert (next_best.label, next_best.probability) == ("dog", 0.25)
    assert next_best.answer == graftml.ClassScore("dog", 0.25, 1)
    # The scores are as they were, and need not hold the answer.
    assert next_best.scores == plain.scores == (graftml.ClassScore("cat", 0.5, 0),)
    [none] = client.predict(b"image", "unsure", decision=graftml.Thresholds(others=0.75))
    assert (none.label, none.probability, none.answer, none.error) == (None, None, None, None)
    assert none.scores == plain.scores

    streamed = list(client.predict_stream([b"image"], "sure", decision=SURE))
    assert [answer.label for answer in streamed] == ["dog"]
    client.predict(b"image", "pets", decision="balanced")
    sent = decisions_of(server)
    assert [each.WhichOneof("rule") for each in sent] == [
        None, "thresholds", "thresholds", "balanced",
    ]  # fmt: skip
    assert dict(sent[1].thresholds.classes) == SURE.classes


@pytest.mark.parametrize(
    "wrong", ["dice", 0.5, {"cat": 0.5}, ["argmax"], graftml.Thresholds({"cat": "0.5"})]  # type: ignore[dict-item]
)  # fmt: skip
def test_what_is_no_decision_is_refused_before_anything_is_sent(
    client: Any, server: FakeGraft, wrong: Any
) -> None:
    for ask in (
        lambda: client.predict(b"image", "pets", decision=wrong),
        lambda: client.fine_tune("ds-1", "pets", decision=wrong),
    ):
        with pytest.raises(graftml.InvalidArgument, match=r"^decision") as caught:
            ask()
        assert caught.value.violations[0].field.startswith("decision")
    assert not server.calls


# The command


def told(server: FakeGraft, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """Runs a command; returns the cells of the lines that it printed."""
    assert main([*arguments, "--server", server.target]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_the_command_takes_a_decision_and_shows_the_answer_first(
    server: FakeGraft, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(b"image")

    def predict(model: str, *options: str) -> list[list[str]]:
        rows = told(server, capsys, "predict", model, str(image), *options)
        assert rows[0] == ["image", "class", "probability"]
        assert rows[1][0] == str(image)
        return [rows[1][1:], *rows[2:]]

    assert predict("pets") == [["cat", "50.0%"]]
    thresholds = ("--threshold", "cat=0.9", "--threshold", "0.2")
    assert predict("sure", *thresholds) == [["dog", "25.0%"]]
    assert predict("sure", *thresholds, "--top-k", "3") == [
        ["dog", "25.0%"], ["cat", "50.0%"], ["fox", "25.0%"],
    ]  # fmt: skip
    assert predict("unsure", "--threshold", "0.75") == [["none"], ["cat", "50.0%"]]
    assert predict("pets", "--decision", "balanced") == [["cat", "50.0%"]]
    assert [each.WhichOneof("rule") for each in decisions_of(server)] == [
        None, "thresholds", "thresholds", "thresholds", "balanced",
    ]  # fmt: skip

    where = ["--json", "--server", server.target]
    assert main(["predict", "unsure", str(image), "--threshold", "0.75", *where]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["label"], line["probability"]) == (None, None)
    assert [score["label"] for score in line["scores"]] == ["cat"]


@pytest.mark.parametrize(
    ("options", "decision"),
    [
        ((), None),
        (("--decision", "balanced"), "balanced"),
        (("--threshold", "a=b=0.5"), graftml.Thresholds({"a=b": 0.5})),
        (("--threshold", "cat=0.9", "--threshold", ".5"), graftml.Thresholds({"cat": 0.9}, 0.5)),
    ],
)
def test_a_fine_tune_takes_a_decision(
    server: FakeGraft,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    decision: Any,
) -> None:
    told(server, capsys, "finetune", "server:/x", "--name", "cats", "--detach", *options)
    with graftml.Client(server.target) as client:
        request = client.get_job("job-1").request
    assert request.HasField("decision") == (decision is not None)
    if decision is not None:
        assert request.decision == _requests.decision(decision)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threshold", "cat"), "'cat' is neither P nor CLASS=P"),
        (("--threshold", "cat="), "'cat=' is neither P nor CLASS=P"),
        (("--threshold", "0.5", "--decision", "argmax"), "not allowed with"),
        (("--decision", "thresholds"), "it must be one of argmax, balanced"),
    ],
)
def test_options_that_are_no_decision_are_refused(
    server: FakeGraft, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(["predict", "pets", "a.jpg", *options, "--server", server.target]) == 2
    assert message in capsys.readouterr().err
