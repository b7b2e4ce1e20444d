"""What is said of how well a version does, and which images belong together."""

import json

import graftml
import pytest
from graftml import types
from graftml.cli import main
from graftml.testing import FakeGraft, published, running, succeeded
from graftml_stubs.v1 import model_pb2 as pb

START = ("finetune", "server:/x", "--name", "cats", "--detach")


@pytest.mark.parametrize(
    ("measured_on", "place"),
    [
        ("cross_validation", "by cross-validation over 244 images"),
        ("held_out", "on 244 held-out images"),
        ("validation", "on 244 validation images"),
        ("test", "on 244 test images"),
        ("target", "on 244 images of the target"),
        ("source", "on 244 images of the source"),
        ("unknown", "on 244 images"),
    ],
)
def test_a_figure_says_what_it_is_of(measured_on: types.MeasuredOn, place: str) -> None:
    def told(images: int, groups: int) -> str:
        return str(graftml.Figure(measured_on, 0.9123, 0.8712, 0.944, 0.3, images, groups))

    assert told(244, 244) == f"0.912 [0.87 to 0.94] {place}"
    assert told(244, 61) == f"0.912 [0.87 to 0.94] {place} in 61 groups"
    one = place.replace("244", "1").replace("images", "image")
    assert told(1, 1) == f"0.912 [0.87 to 0.94] {one}"
    assert told(244, 1).endswith(" in 1 group")


def test_groups_are_named_by_a_pattern_or_by_a_folder(
    server: FakeGraft, capsys: pytest.CaptureFixture[str]
) -> None:
    start = [*START, "--server", server.target]
    assert main([*start, "--group-pattern", "{group}_*.jpg"]) == 0
    [request] = server.requests("FineTune")
    assert request.grouping.name_pattern == "{group}_*.jpg"
    assert request.WhichOneof("method") == "auto"
    for wrong, told in (
        (["--group-pattern", "{group}_*", "--group-by-folder", "1"], "not allowed with argument"),
        (["--class-recall", "ants"], "'ants' is not CLASS=R, such as ants=0.8"),
        (["--class-recall", "ants=2"], "--class-recall: 2 is not from 0 to 1"),
        (["--min-accuracy", "90"], "--min-accuracy: 90 is not from 0 to 1"),
        (["--threshold", "ants=nan"], "--threshold: nan is not from 0 to 1"),
    ):
        assert main([*start, *wrong]) == 2
        assert told in capsys.readouterr().err


def test_what_could_not_be_measured_is_told_with_what_is_not_calibrated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with FakeGraft(script=[running(), published(None), succeeded()]) as server:
        where = ["--server", server.target]
        assert main(["finetune", "server:/x", "--name", "cats", *where]) == 0
        out = capsys.readouterr().out
        assert "cats version 1: nothing could be measured\n" in out
        assert "its probabilities are not calibrated: nothing could be measured\n" in out
        assert main(["models", "versions", "cats", *where]) == 0
        assert "nothing could be measured, not calibrated" in capsys.readouterr().out
        assert main(["predict", "cats", __file__, *where]) == 0
        assert "not calibrated" in capsys.readouterr().out


def test_what_was_let_pass_though_it_cannot_be_told_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check = pb.GateCheck(name="accuracy", verdict=pb.GATE_VERDICT_UNDECIDED, passed=True)
    check.detail = "accuracy: it cannot be told, no image was measured on"
    version = pb.Version(model="cats", version=1, gate_checks=[check])
    with FakeGraft(script=[running(), published(None), succeeded()]) as server:
        server.answer("GetVersion", pb.GetVersionResponse(version=version))
        command = ["finetune", "server:/x", "--name", "cats", "--min-accuracy", "0.9"]
        where = ["--server", server.target]
        told = "undecided, and let pass as asked: accuracy: it cannot be told, no image was"
        assert main([*command, "--when-uncertain", "promote", *where]) == 0
        assert told in capsys.readouterr().err
        assert main(["jobs", "watch", "job-1", *where]) == 0
        assert told in capsys.readouterr().err


def test_a_version_that_fails_its_gate_is_plainly_called_a_candidate(
    capsys: pytest.CaptureFixture[str],
) -> None:
    why = "worse than version 1 on the same images, p = 0.003"
    low = "accuracy: 0.8 was measured, 0.9 was asked for"
    script = [running(), published(0.8, gate_failures=[low, why]), succeeded()]
    with FakeGraft(script=script) as server:
        where = ["--server", server.target]
        command = ["finetune", "server:/x", "--name", "cats", "--min-accuracy", "0.9"]
        assert main([*command, *where]) == 4
        out = capsys.readouterr().out
        assert "succeeded" not in out
        assert "0.800 [0.76 to 0.84] by cross-validation over 20 images; kept as a candidate" in out
        assert out.endswith(
            "cats version 1 did not pass its gate and is kept as a candidate:\n"
            f"- {low}\n"
            f"- {why}\n"
            "Try it: graft predict cats:1 IMAGE - publish it all the same: graft promote cats 1\n"
        )
        assert main(["jobs", "watch", "job-1", *where]) == 4
        assert "publish it all the same: graft promote cats 1" in capsys.readouterr().out
        assert main([*command, *where, "--json"]) == 4
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert (told[-1]["is_candidate"], told[-3]["is_candidate"]) == (True, True)
        assert told[-1]["gate_checks"][1]["detail"] == why
        assert main(["models", "versions", "cats", *where]) == 0
        assert "candidate" in capsys.readouterr().out
        assert main(["jobs", *where]) == 0
        out = capsys.readouterr().out
        assert ("candidate" in out, "succeeded" in out) == (True, False)
        assert main(["promote", "cats", "1", *where]) == 0


def test_an_adapted_version_that_is_not_measured_comes_with_what_would_measure_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapted = pb.Version(model="cats", version=1, method=pb.TRANSFER_METHOD_DOMAIN_ADAPTATION)
    with FakeGraft(script=[running(), published(None), succeeded()]) as server:
        server.answer("GetVersion", pb.GetVersionResponse(version=adapted))
        assert main(["finetune", "server:/x", "--name", "cats", "--server", server.target]) == 0
    assert "and --evaluate-on-target\n" in capsys.readouterr().out
