"""A backbone of one's own: a real client, service and trainers, and a server that is restarted."""

import subprocess
import sys
from pathlib import Path

import graftml
import numpy as np
import pytest

from service.engine import preprocess, providers
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from tests.e2e.conftest import GUARD_S, Connect, StartService
from tests.extractors import MEAN, SIZE, STD, write

pytestmark = pytest.mark.e2e


def test_an_onnx_file_is_registered_learned_on_served_ranked_and_exported(
    start_service: StartService, connect: Connect, digits: Path, tmp_path: Path
) -> None:
    service = start_service("--warm-trainers=0")
    client = connect(service)
    backbone = client.register_backbone(
        write(tmp_path / "tiny.onnx"), "tiny", size=SIZE, mean=MEAN, std=STD, licence="MIT"
    )
    assert (backbone.name, backbone.feature_dim) == ("onnx/tiny", 12)
    job = client.fine_tune(digits, "digits", backbone="onnx/tiny", method="feature_based")
    version = job.wait(timeout_s=GUARD_S)
    assert (version.backbone, version.backbone_digest) == ("onnx/tiny", backbone.digest)
    assert version.parity is not None and version.parity.max_difference < 1e-3
    # Of four digits, with twelve features of random kernels.
    assert version.headline is not None and version.headline.accuracy > 0.5
    images = sorted(digits.rglob("*.png"))[::8]
    # One by one: which images share a batch, and with it a last bit, is a matter of timing.
    before = [client.predict(path, "digits", top_k=4)[0] for path in images]
    assert sum(p.label == path.parent.name for p, path in zip(before, images, strict=True)) > 5

    with pytest.raises(graftml.FailedPrecondition) as caught:
        client.delete_backbone("tiny")
    assert caught.value.reason == graftml.Reason.BACKBONE_IN_USE
    with pytest.raises(graftml.InvalidArgument, match="whose network is used as it is"):
        client.fine_tune(digits, "digits", backbone="onnx/tiny", method="model_based")

    ranking = client.rank_backbones(digits, backbones="onnx/tiny", time_budget_s=GUARD_S)
    [ranked] = ranking.backbones
    assert ranked.problem == ""
    assert ranked.log_me is not None
    assert ranked.weights == version.weights

    exported = client.export_model("digits", tmp_path / "digits.onnx")
    decoding = version.manifest["decoding"]
    assert decoding["size"] == SIZE
    pixels = np.stack(
        [preprocess.decode(path.read_bytes(), _decoding(decoding)) for path in images]
    )
    answers = OnnxRuntime(Provider("cpu", "")).load(exported.read_bytes).run(pixels)
    for row, prediction in zip(answers, before, strict=True):
        for score in prediction.scores:
            assert abs(float(row[score.class_index]) - score.probability) < 1e-4

    assert service.end() == 0
    client = connect(start_service("--warm-trainers=0"))
    after = [client.predict(path, "digits", top_k=4)[0] for path in images]
    assert [p.scores for p in after] == [p.scores for p in before]
    assert backbone in list(client.list_backbones())
    client.delete_model("digits")
    client.delete_backbone("onnx/tiny")
    assert backbone.name not in [each.name for each in client.list_backbones()]


@pytest.mark.skipif(bool(providers.openvino_problem()), reason="OpenVINO is not installed")
def test_a_backbone_is_measured_beside_its_calls_and_answers_as_before(
    start_service: StartService, connect: Connect, digits: Path, tmp_path: Path
) -> None:
    service = start_service("--provider=auto", "--warm-trainers=0")
    client = connect(service)
    client.register_backbone(
        write(tmp_path / "tiny.onnx"), "tiny", size=SIZE, mean=MEAN, std=STD, licence="MIT"
    )
    job = client.fine_tune(digits, "digits", backbone="onnx/tiny", method="feature_based")
    digest = job.wait(timeout_s=GUARD_S).backbone_digest
    images = sorted(digits.rglob("*.png"))[::20]
    before = client.predict(images, "digits", top_k=4)
    measured = service.wait_for("backbone measured")
    assert (measured["backbone"], measured["precision"]) == (digest, "fp32")
    after = client.predict(images, "digits", top_k=4)
    for one, other in zip(before, after, strict=True):
        scores = {each.label: each.probability for each in other.scores}
        for each in one.scores:
            assert scores[each.label] == pytest.approx(each.probability, abs=1e-3)
    told = subprocess.run(
        [sys.executable, "-m", "service", "doctor", f"--data-dir={tmp_path / 'data'}"],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=True,
    ).stdout
    assert f"measured    {digest[:12]} fp32: " in told


def _decoding(told: dict[str, object]) -> preprocess.ImageDecoding:
    return preprocess.ImageDecoding(**told)  # type: ignore[arg-type]
