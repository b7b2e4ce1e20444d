"""Adapting, gating, rolling back and growing: a real client, service and trainers."""

from pathlib import Path

import graftml
import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import GUARD_S, ServiceProcess

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def inverted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scans, light on dark: another domain, in a folder per class."""
    root = tmp_path_factory.mktemp("inverted")
    for path in digits.rglob("*.png"):
        target = root / path.relative_to(digits)
        target.parent.mkdir(exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(target)
    return root


def test_a_model_is_adapted_to_images_without_labels(
    client: graftml.Client, digits: Path, inverted: Path
) -> None:
    method = graftml.DomainAdaptation(target=inverted, evaluate_on_target=True)
    job = client.fine_tune(digits, name="adapted", method=method)
    version = job.wait(timeout_s=GUARD_S)
    assert version.method == "domain_adaptation"
    assert version.headline is not None
    assert (version.headline.measured_on, version.headline.image_count) == ("target", 80)
    adaptation = client.get_report("adapted")["adaptation"]
    assert adaptation["target_images"] == 80
    # None where the source's head was kept; else what adapting won over it, on the target.
    comparison = adaptation["comparison"]
    assert comparison is None or comparison["difference"] >= -0.02
    answers = client.predict(sorted(inverted.rglob("*.png"))[::8], model="adapted")
    assert all(answer.out_of_distribution_score is not None for answer in answers)


def test_a_version_that_fails_its_gate_is_kept_and_a_good_one_is_rolled_back(
    shared: ServiceProcess, client: graftml.Client, digits: Path
) -> None:
    gate = graftml.Gate(min_accuracy=0.5, alias="prod")
    first = client.fine_tune(digits, name="gated", gate=gate).wait(timeout_s=GUARD_S)
    assert (first.version, first.is_candidate) == (1, False)
    assert client.get_model("gated").aliases == {"latest": 1, "prod": 1}

    asked = graftml.Gate(
        min_accuracy=1.0, max_latency_ms=0.001, not_worse_than="prod", alias="prod"
    )
    second = client.fine_tune(digits, name="gated", gate=asked).wait(timeout_s=GUARD_S)
    assert second.is_candidate
    # The same images and the same method: identical answers pass, however few they are.
    assert {c.name: c.verdict for c in second.gate_checks}["not_worse"] == "passed", [
        c.detail for c in second.gate_checks
    ]
    assert {c.name: c.verdict for c in second.gate_checks}["latency"] == "failed"
    assert client.get_model("gated").aliases == {"latest": 1, "prod": 1}
    [answer] = client.predict(next(digits.rglob("*.png")), model="gated", version=2)
    assert answer.version == 2

    client.promote_version("gated", 2)
    assert client.get_model("gated").aliases["latest"] == 2
    assert client.rollback_alias("gated").to_version == 1
    assert client.get_model("gated").aliases == {"latest": 1, "prod": 1}

    metrics = shared.metrics()
    assert 'graft_outlier_score_bucket{le="1.0",model="gated",origin="validation"}' in metrics
    assert 'graft_outlier_score_count{model="gated",origin="live"} 1.0' in metrics


def test_a_model_grows_by_a_class_and_computes_the_old_images_no_more(
    client: graftml.Client, digits: Path
) -> None:
    few = [(p.parent.name, p) for p in sorted(digits.rglob("*.png")) if p.parent.name != "3"]
    client.fine_tune(few, name="grown").wait(timeout_s=GUARD_S)
    more = [("3", p) for p in sorted((digits / "3").iterdir())]
    more += [("0", p) for p in sorted((digits / "0").iterdir())[:2]]
    version = client.fine_tune(more, name="grown", base=1).wait(timeout_s=GUARD_S)
    assert version.classes == ("0", "1", "2", "3")
    growth = client.get_report("grown")["growth"]
    assert growth["base_version"] == 1
    assert growth["added_classes"] == ["3"]
    assert growth["base_images"] + growth["added_images"] == 80
