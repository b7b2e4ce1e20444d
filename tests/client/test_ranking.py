"""Backbones ranked: what is sent, what comes back, and what the command prints."""

import json
from pathlib import Path
from typing import Any

import graft
import pytest
from graft.cli import main
from graft.testing import FakeGraft


def test_candidates_are_named_in_two_ways_and_images_are_uploaded(
    client: Any, server: FakeGraft, folder: Path
) -> None:
    ranking = client.rank_backbones(
        folder,
        backbones=["resnet18", "resnet50:random", graft.PretrainedBackbone("resnet34", "x")],
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
    assert len(server.images(request.dataset_id)) == 6
    assert [ranked.backbone for ranked in ranking.backbones] == ["resnet18", "resnet50", "resnet34"]
    assert ranking.backbones[0] == graft.RankedBackbone(
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
    client.rank_backbones(graft.ServerPath("/images"), backbones="resnet18")
    client.rank_backbones(graft.ServerPath("/images"))
    one, none = server.requests("RankBackbones")
    assert [c.backbone for c in one.backbones] == ["resnet18"]
    assert one.server_path.path == "/images"
    assert not none.backbones
    assert not none.HasField("time_budget")
    assert not none.HasField("seed")


def test_a_ranking_waits_beyond_its_time_budget_and_no_longer_than_asked(
    connect: Any, server: FakeGraft
) -> None:
    # A pause before the repeat that the client's own deadline would not allow.
    slow = graft.RetryPolicy(initial_delay_s=0.1, max_delay_s=0.1)
    client = connect(server.target, timeout_s=0.01, retry=slow)
    server.fail("RankBackbones", graft.Unavailable("restarting"))
    assert client.rank_backbones(graft.ServerPath("/images"), time_budget_s=1).backbones
    # A pause that would be longer than what was asked for.
    slow = graft.RetryPolicy(initial_delay_s=1000, max_delay_s=1000)
    client = connect(server.target, retry=slow)
    server.fail("RankBackbones", graft.Unavailable("restarting"))
    with pytest.raises(graft.Unavailable):
        client.rank_backbones(graft.ServerPath("/images"), timeout_s=60)


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
    assert told["image_count"] == 10
    assert told["backbones"][0]["backbone"] == "efficientnet_lite0"


def test_what_is_unlabelled_or_gone_cannot_be_ranked_on(client: Any, folder: Path) -> None:
    dataset = client.upload_dataset(folder, is_unlabelled=True)
    with pytest.raises(graft.InvalidArgument) as unlabelled:
        client.rank_backbones(dataset)
    assert unlabelled.value.reason == graft.Reason.DATASET_UNUSABLE
    client.delete_dataset(dataset.dataset_id)
    with pytest.raises(graft.NotFound) as gone:
        client.rank_backbones(dataset)
    for caught in (unlabelled, gone):
        assert [violation.field for violation in caught.value.violations] == ["dataset_id"]
