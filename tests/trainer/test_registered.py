"""Jobs on a registered backbone: its file as it is, and nothing of PyTorch's."""

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
    Note,
    PretrainedBackbone,
    RankSpec,
    decode_record,
    form_name,
)
from service.engine.providers import Provider
from service.engine.runtime import OnnxRuntime
from service.errors import GraftError, Reason
from tests.extractors import SIZE
from tests.trainer.conftest import (
    GUARD_S,
    MakeFolder,
    MakeSpec,
    Told,
    manifest_of,
    registered,
    source_of,
    without_torch,
)
from trainer.backbone_file import BackboneFile
from trainer.train import run


def spec_of(make: MakeSpec, folder: Path, file: Path, **changes: object) -> JobSpec:
    return make(folder, **{**registered(file), **changes})


def test_jobs_and_rankings_need_no_torch(
    make_folder: MakeFolder, make_spec: MakeSpec, registered_file: Path, tmp_path: Path
) -> None:
    folder, many = make_folder(per_class=12), make_folder("many", per_class=60)
    target = make_folder("target", 12, seed=5)

    def spec(name: str, images: Path, **changes: object) -> JobSpec:
        out = {"out_dir": str(tmp_path / name)}
        return spec_of(make_spec, images, registered_file, **out, **changes)

    adapting = DomainAdaptation(evaluate_on_target=True)
    jobs = [
        spec("plain", folder, baselines=["linear_probe"]),
        spec("views", folder, method=FeatureBased(augmented_views=2)),
        # As many as training would take.
        spec("auto", many, method=Auto()),
        spec("adapted", folder, method=adapting, target=source_of(target)),
    ]
    known = registered(registered_file)
    tiny = PretrainedBackbone(
        backbone=known["backbone"], weights=known["weights"], exported=known["exported"]
    )
    gone = ExportedBackbone("sha256:0", "0" * 64)
    asked = RankSpec(
        data=source_of(folder),
        files=known["files"],
        backbones=[
            tiny,
            PretrainedBackbone(backbone="onnx/gone", weights="sha256:" + "0" * 16, exported=[gone]),
        ],
        weights_dir=str(tmp_path / "weights"),
        time_budget_s=GUARD_S,
        provider="cpu",
        threads=1,
    )
    printed = without_torch([*jobs, asked], tmp_path, "sklearn", "matplotlib")

    for job in jobs:
        manifest = manifest_of(job)
        is_adapted = job.method == adapting
        assert manifest.method == ("domain_adaptation" if is_adapted else "feature_based")
        assert (manifest.backbone, manifest.weights) == ("onnx/tiny", tiny.weights)
        assert manifest.weights_licence == "MIT"
        assert manifest.backbone_digest == tiny.exported[0].digest
        assert (manifest.feature_dim, manifest.decoding.size, manifest.opset) == (12, SIZE, 17)
        # Two colours are told apart by the means of what sees them.
        assert manifest.headline is not None and manifest.headline.accuracy > 0.9
        assert (manifest.headline.measured_on == "target") == is_adapted
        assert manifest.parity.images == 8 and manifest.parity.max_difference < 1e-3
        # The store has the file already.
        assert not (Path(job.out_dir) / "backbone.onnx").exists()

    found = decode_record(printed.encode())
    assert isinstance(found, BackbonesRanked)
    first, other = found.ranking
    assert (first.backbone, first.weights) == ("onnx/tiny", tiny.weights)
    assert (first.feature_dim, first.problem) == (12, "")
    assert first.log_me is not None and first.image_ms is not None
    assert first.weights_licence == "MIT"
    assert other.problem == "the file of onnx/gone is not on this server: register it again"


def test_auto_says_why_the_network_is_not_trained(
    make_folder: MakeFolder, make_spec: MakeSpec, registered_file: Path, told: Told
) -> None:
    folder = make_folder(per_class=60)
    run(spec_of(make_spec, folder, registered_file, method=Auto()), told.append)
    (said,) = [n for n in told.of(Note) if isinstance(n, Note) and "not trained" in n.text]
    assert said.text == (
        "the network is not trained: onnx/tiny is a registered file, which is used as it is; "
        "backbones that come with Graft can be trained"
    )


def test_a_file_that_serves_otherwise_than_it_computes_is_not_published(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    registered_file: Path,
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from trainer import train

    other = tmp_path / "other.onnx"
    model = onnx.load_from_string(registered_file.read_bytes())
    (shift,) = [tensor for tensor in model.graph.initializer if tensor.name == "shift"]
    shift.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(shift), "shift"))
    other.write_bytes(model.SerializeToString())
    runtime = OnnxRuntime(Provider("cpu", "for the test"), 2)
    monkeypatch.setattr(train, "_on_cpu", lambda job, file, digest: BackboneFile(other, runtime))
    with pytest.raises(GraftError, match="differs from ONNX Runtime on the CPU by") as caught:
        run(spec_of(make_spec, make_folder(per_class=6), registered_file), told.append)
    assert caught.value.reason is Reason.PARITY_FAILED


def test_a_file_that_is_gone_is_told_as_that(
    make_folder: MakeFolder, make_spec: MakeSpec, registered_file: Path, told: Told
) -> None:
    with pytest.raises(GraftError, match="register it again, or name another") as caught:
        run(spec_of(make_spec, make_folder(), registered_file, files={}), told.append)
    assert caught.value.reason is Reason.BACKBONE_NOT_FOUND


def test_a_quantised_form_is_made_of_it_and_shared(
    make_folder: MakeFolder,
    make_spec: MakeSpec,
    registered_file: Path,
    told: Told,
    tmp_path: Path,
) -> None:
    spec = spec_of(make_spec, make_folder(per_class=20), registered_file, precision="int8")
    first = run(spec, told.append)
    assert (first.serving_precision, first.weights) == ("int8", spec.weights)
    made = tmp_path / "out" / "backbone.onnx"
    shared = ExportedBackbone(form_name(spec.weights, "int8"), first.backbone_digest)
    again = run(
        msgspec.structs.replace(
            spec,
            out_dir=str(tmp_path / "again"),
            exported=[*spec.exported, shared],
            files={**spec.files, shared.digest: str(made)},
        ),
        told.append,
    )
    assert again.backbone_digest == first.backbone_digest
