"""Jobs on a registered backbone: its file as it is, and nothing of PyTorch's."""

import hashlib
import os
from pathlib import Path

import msgspec
import onnx
import pytest

from service.contract import (
    Auto,
    BackbonesRanked,
    DomainAdaptation,
    ExportedBackbone,
    FeatureBased,
    JobSpec,
    Method,
    Note,
    PretrainedBackbone,
    RankSpec,
    decode_record,
)
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from service.errors import GraftError, Reason
from service.ingest.backbone_process import Asked, BackboneChecks
from tests.extractors import MEAN, SIZE, STD, layered, write
from tests.trainer.conftest import (
    GUARD_S,
    MakeFolder,
    MakeSpec,
    Told,
    made_without_torch,
    source_of,
    without_torch,
)
from trainer.backbone_file import BackboneFile
from trainer.train import run

KEPT = "registered.onnx"


@pytest.fixture
def registered(tmp_path: Path) -> PretrainedBackbone:
    """A file as the service keeps it, and what a trainer is told of it."""
    kept = tmp_path / KEPT
    asked = Asked(size=SIZE, mean=MEAN, std=STD)
    given = write(tmp_path / "given.onnx", layered())
    BackboneChecks(os.environ).check(given, kept, asked, lambda: None)
    digest = hashlib.sha256(kept.read_bytes()).hexdigest()
    weights = f"sha256:{digest[:16]}"
    known = ExportedBackbone(weights, digest, "MIT")
    return PretrainedBackbone(backbone="onnx/tiny", weights=weights, exported=[known])


def spec_of(make: MakeSpec, folder: Path, given: PretrainedBackbone, **changes: object) -> JobSpec:
    fields: dict[str, object] = {
        "backbone": given.backbone,
        "weights": given.weights,
        "exported": given.exported,
        "files": {given.exported[0].digest: str(folder.parent / KEPT)},
    }
    return make(folder, **{**fields, **changes})


@pytest.mark.parametrize(
    "method",
    [FeatureBased(), FeatureBased(augmented_views=2), Auto()],
    ids=["plain", "views", "auto"],
)
def test_a_job_needs_no_torch(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    registered: PretrainedBackbone,
    tmp_path: Path,
    method: Method,
) -> None:
    folder = make_folder(per_class=60)
    spec = spec_of(make_spec, folder, registered, method=method, baselines=["linear_probe"])
    manifest = made_without_torch(spec, tmp_path)
    assert (manifest.method, manifest.backbone) == ("feature_based", "onnx/tiny")
    assert (manifest.weights, manifest.weights_licence) == (registered.weights, "MIT")
    assert manifest.backbone_digest == registered.exported[0].digest
    assert (manifest.feature_dim, manifest.decoding.size, manifest.opset) == (12, SIZE, 17)
    # Two colours are told apart by the means of what sees them.
    assert manifest.headline is not None and manifest.headline.accuracy > 0.9
    assert manifest.parity.images == 8 and manifest.parity.max_difference < 1e-3
    # The store has the file already.
    assert not (Path(spec.out_dir) / "backbone.onnx").exists()


def test_a_head_is_adapted_without_torch(
    make_folder: MakeFolder, make_spec: MakeSpec, registered: PretrainedBackbone, tmp_path: Path
) -> None:
    source, target = make_folder("source", per_class=12), make_folder("target", 12, seed=5)
    method = DomainAdaptation(evaluate_on_target=True)
    spec = spec_of(make_spec, source, registered, method=method, target=source_of(target))
    manifest = made_without_torch(spec, tmp_path)
    assert (manifest.method, manifest.backbone) == ("domain_adaptation", "onnx/tiny")
    assert manifest.headline is not None and manifest.headline.measured_on == "target"


def test_auto_says_why_the_network_is_not_trained(
    make_folder: MakeFolder, make_spec: MakeSpec, registered: PretrainedBackbone, told: Told
) -> None:
    folder = make_folder(per_class=60)
    run(spec_of(make_spec, folder, registered, method=Auto()), told.append)
    (said,) = [n for n in told.of(Note) if isinstance(n, Note) and "not trained" in n.text]
    assert said.text == (
        "the network is not trained: onnx/tiny is a registered file, which is used as it is; "
        "backbones that come with Graft can be trained"
    )


def test_a_file_that_serves_otherwise_than_it_computes_is_not_published(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    registered: PretrainedBackbone,
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainer import train

    other = tmp_path / "other.onnx"
    model = onnx.load_from_string((tmp_path / KEPT).read_bytes())
    (shift,) = [tensor for tensor in model.graph.initializer if tensor.name == "shift"]
    shift.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(shift), "shift"))
    other.write_bytes(model.SerializeToString())
    runtime = OnnxRuntime(Provider("cpu", "for the test"), 2)
    monkeypatch.setattr(train, "_on_cpu", lambda job, file, digest: BackboneFile(other, runtime))
    with pytest.raises(GraftError, match="differs from ONNX Runtime on the CPU by") as caught:
        run(spec_of(make_spec, make_folder(per_class=6), registered), told.append)
    assert caught.value.reason is Reason.PARITY_FAILED


def test_a_file_that_is_gone_is_told_as_that(
    make_folder: MakeFolder, make_spec: MakeSpec, registered: PretrainedBackbone, told: Told
) -> None:
    with pytest.raises(GraftError, match="register it again, or name another") as caught:
        run(spec_of(make_spec, make_folder(), registered, files={}), told.append)
    assert caught.value.reason is Reason.BACKBONE_NOT_FOUND


def test_a_quantised_form_is_made_of_it_and_shared(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    registered: PretrainedBackbone,
    told: Told,
    tmp_path: Path,
) -> None:
    folder = make_folder(per_class=20)
    first = run(spec_of(make_spec, folder, registered, precision="int8"), told.append)
    assert (first.serving_precision, first.weights) == ("int8", registered.weights)
    made = tmp_path / "out" / "backbone.onnx"
    shared = ExportedBackbone(f"{registered.weights}:int8", first.backbone_digest)
    both = msgspec.structs.replace(registered, exported=[*registered.exported, shared])
    paths = (tmp_path / KEPT, made)
    files = {e.digest: str(path) for e, path in zip(both.exported, paths, strict=True)}
    out = str(tmp_path / "again")
    again = run(
        spec_of(make_spec, folder, both, precision="int8", out_dir=out, files=files), told.append
    )
    assert again.backbone_digest == first.backbone_digest


def test_it_is_ranked_without_torch(
    make_folder: MakeFolder, registered: PretrainedBackbone, tmp_path: Path
) -> None:
    gone = ExportedBackbone("sha256:0", "0" * 64)
    spec = RankSpec(
        data=source_of(make_folder(per_class=10)),
        files={registered.exported[0].digest: str(tmp_path / KEPT)},
        backbones=[
            registered,
            PretrainedBackbone(backbone="onnx/gone", weights="sha256:" + "0" * 16, exported=[gone]),
        ],
        weights_dir=str(tmp_path / "weights"),
        time_budget_s=GUARD_S,
        provider="cpu",
        threads=1,
    )
    found = decode_record(without_torch(spec, tmp_path).encode())
    assert isinstance(found, BackbonesRanked)
    tiny, other = found.ranking
    assert (tiny.backbone, tiny.weights) == ("onnx/tiny", registered.weights)
    assert (tiny.feature_dim, tiny.problem) == (12, "")
    assert tiny.log_me is not None and tiny.image_ms is not None
    assert tiny.weights_licence == "MIT"
    assert other.problem == "the file of onnx/gone is not on this server: register it again"
