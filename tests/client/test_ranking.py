"""Backbones ranked: what is sent, what comes back, and what the command prints."""

import json
from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml.cli import main
from graftml.testing import FakeGraft, failed, running


def test_candidates_are_named_in_two_ways_and_images_are_uploaded(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    ranking = client.rank_backbones(
        folder,
        backbones=["resnet18", "resnet50:random", graftml.PretrainedBackbone("resnet34", "x")],
        time_budget_s=2.5,
        seed=0,
    )
    check, request = server.requests("RankBackbones")
    assert (check.validate_only, request.validate_only) == (True, False)
    assert check.backbones == request.backbones
    assert [(c.backbone, c.weights) for c in request.backbones] == [
        ("resnet18", ""),
        ("resnet50", "random"),
        ("resnet34", "x"),
    ]
    assert request.time_budget.ToMilliseconds() == 2500
    assert request.HasField("seed")
    assert client.get_dataset(request.dataset_id).image_count == 6
    assert [ranked.backbone for ranked in ranking.backbones] == ["resnet18", "resnet50", "resnet34"]
    assert ranking.backbones[0] == graftml.RankedBackbone(
        backbone="resnet18",
        weights="fake",
        log_loss=0.1,
        log_me=-0.1,
        image_ms=5.0,
        feature_dim=1280,
        problem="",
        weights_licence="not known",
    )
    assert ranking.image_count == 6
    assert ranking.explanation == "resnet18 was named first."


def test_one_name_alone_and_none_are_fine_and_the_rest_is_left_unset(
    client: Any, server: FakeGraft
) -> None:
    client.rank_backbones(graftml.ServerPath("/images"), backbones="resnet18")
    client.rank_backbones(graftml.ServerPath("/images"))
    one, none = server.requests("RankBackbones")
    assert [c.backbone for c in one.backbones] == ["resnet18"]
    assert one.server_path.path == "/images"
    assert not none.backbones
    assert not none.HasField("time_budget")
    assert not none.HasField("seed")


def test_a_ranking_is_followed_by_whoever_started_it(client: Any, server: FakeGraft) -> None:
    started = client.start_ranking(graftml.ServerPath("/images"), request_id="once")
    again = client.start_ranking(graftml.ServerPath("/images"), request_id="once")
    assert (again.job_id, again.job.kind) == (started.job_id, "ranking")
    ranking = started.wait()
    assert ranking == started.job.ranking
    assert started.job.request.request_id == "once"
    client.delete_job(started.job_id)
    with pytest.raises(graftml.NotFound):
        client.get_job(started.job_id)


def test_a_ranking_that_takes_longer_than_asked_is_cancelled(connect: Any) -> None:
    with FakeGraft(ranking_script=[running()]) as server:
        client = connect(server.target)
        with pytest.raises(graftml.DeadlineExceeded):
            client.rank_backbones(graftml.ServerPath("/images"), timeout_s=0.2)
        (asked,) = server.requests("CancelJob")
        assert client.get_job(asked.job_id).state == "CANCELLED"


def test_a_ranking_that_failed_says_why(connect: Any) -> None:
    script = [running(), failed("one class only", graftml.Reason.DATASET_UNUSABLE)]
    with FakeGraft(ranking_script=script) as server:
        with pytest.raises(graftml.JobFailed, match="one class only") as caught:
            connect(server.target).rank_backbones(graftml.ServerPath("/images"))
        assert caught.value.reason == graftml.Reason.DATASET_UNUSABLE
        assert not server.requests("CancelJob")


def test_the_command_prints_a_table_the_reason_and_each_problem(
    server: FakeGraft, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rank", str(folder), "--backbone", "resnet18", "--backbone", "resnet50:random"]
    assert main([*arguments, "--time-budget", "9", "--server", server.target]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = [line.split() for line in out.splitlines()]
    assert ["resnet18", "fake", "0.100", "-0.100", "5", "1280", "not", "known"] in rows
    assert ["resnet50", "random", "0.200", "-0.200", "10", "1280", "not", "known"] in rows
    assert out.rstrip().endswith("resnet18 was named first.")
    assert server.requests("RankBackbones")[0].time_budget.seconds == 9


def test_the_command_speaks_json(server: FakeGraft, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", "server:/images", "--json", "--server", server.target]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["image_count"] == 6
    assert told["backbones"][0]["backbone"] == "efficientnet_lite0"


def test_a_ranking_is_watched_by_the_command_and_makes_no_version(
    client: Any, server: FakeGraft, capsys: pytest.CaptureFixture[str]
) -> None:
    job_id = client.start_ranking(graftml.ServerPath("/images")).job_id
    with pytest.raises(graftml.InvalidArgument, match="makes no version"):
        client.job(job_id).wait()
    assert main(["jobs", "watch", job_id, "--server", server.target]) == 0
    assert "efficientnet_lite0" in capsys.readouterr().out
    assert main(["jobs", "delete", job_id, "--server", server.target]) == 0
    assert capsys.readouterr().out == f"deleted {job_id}\n"
