"""Which backbone comes first, what it says of the others, and what it does without time."""

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from service.contract import (
    BackbonesRanked,
    ExportedBackbone,
    FeatureBased,
    ImageSource,
    JobSpec,
    Note,
    PretrainedBackbone,
    Progressed,
    RankedBackbone,
    RankSpec,
)
from service.engine.head import Floats
from service.engine.preprocess import Pixels
from service.engine.runtime import Read
from service.errors import InvalidInput, Reason, WrongState
from tests import photographs
from tests.fake_runtime import FakeSession
from tests.trainer.conftest import MakeFolder, Told, source_of
from trainer import data, ranked_backbone, ranking
from trainer.job import Job
from trainer.weights import Weights

LITE0 = Weights("efficientnet_lite0", "", 0, Path()).name


class Blind(FakeSession):
    """Features that say nothing of the image's class."""

    feature_dim = 64

    def run(self, images: Pixels, cores: int = 0) -> Floats:
        super().run(images, cores)
        seeds = [zlib.crc32(image.tobytes()) for image in images]
        return np.stack(
            [np.random.default_rng(seed).gamma(2, 1, 64).astype(np.float32) for seed in seeds]
        )


class Machine:
    """Files named blind are; every run takes as long as `each_s` says, on its own clock."""

    is_gpu, computes = False, staticmethod({"fp32", "int8"}.__contains__)

    def __init__(self) -> None:
        self.now = 0.0
        self.sessions: dict[str, FakeSession] = {}
        self.loads: list[str] = []
        self.each_s: dict[str, float] = {}
        self.slower_after: dict[str, int] = {}

    def load(self, read: Read, digest: str = "") -> FakeSession:
        self.loads.append(onnx.load_from_string(read()).producer_name)
        return self.session(self.loads[-1])

    def session(self, name: str) -> FakeSession:
        if name not in self.sessions:
            session = Blind() if "blind" in name else FakeSession()
            plain = session.run

            def run(images: Pixels, cores: int = 0) -> Floats:
                each_s = self.each_s.get(name, 0.001)
                if sum(session.batches) >= self.slower_after.get(name, 10**9):
                    each_s *= 1000
                self.now += each_s * len(images)
                return plain(images, cores)

            session.run = run  # type: ignore[method-assign]
            self.sessions[name] = session
        return self.sessions[name]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    clock = SimpleNamespace(monotonic=lambda: made.now)
    monkeypatch.setattr(ranking, "time", clock)
    monkeypatch.setattr(ranked_backbone, "time", clock)
    monkeypatch.setattr(ranking, "runtime_of", lambda _spec, **_: made)
    return made


MakeBackbone = Callable[..., PretrainedBackbone]


def ends(width: int) -> onnx.ModelProto:
    """A graph that computes nothing, with the input and the output of a backbone."""
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [],
        "ends",
        [tensor("images", onnx.TensorProto.UINT8, ["n", 224, 224, 3])],
        [tensor("features", onnx.TensorProto.FLOAT, ["n", width])],
    )
    return onnx.helper.make_model(graph)


@pytest.fixture
def pretrained(tmp_path: Path) -> MakeBackbone:
    """One whose file was exported before: the shapes of its ends are all that it holds."""

    def make(file: str, backbone: str = "resnet18", weights: str = "random") -> PretrainedBackbone:
        made = ends(64 if "blind" in file else 3)
        made.producer_name = file
        content = made.SerializeToString()
        digest = hashlib.sha256(content).hexdigest()
        (tmp_path / f"{digest}.onnx").write_bytes(content)
        name = Weights(backbone, weights, 0, tmp_path).name
        exported = [ExportedBackbone(weights=name, digest=digest)]
        return PretrainedBackbone(backbone=backbone, weights=weights, exported=exported)

    return make


def spec(folder: Path, *named: PretrainedBackbone, **changes: object) -> RankSpec:
    known = [each.digest for backbone in named for each in backbone.exported]
    fields: dict[str, object] = {
        "data": source_of(folder),
        "files": {digest: str(folder.parent / f"{digest}.onnx") for digest in known},
        "backbones": list(named),
        "weights_dir": str(folder.parent / "weights"),
        "provider": "cpu",
        "threads": 1,
    }
    return RankSpec(**{**fields, **changes})  # type: ignore[arg-type]


def names(ranked: BackbonesRanked) -> list[str]:
    return [row.backbone for row in ranked.ranking]


def test_the_backbone_whose_features_tell_the_classes_apart_is_first(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told
) -> None:
    machine.each_s = {"colours": 0.004, "blind": 0.002}
    ranked = ranking.rank(
        spec(
            make_folder(per_class=12),
            pretrained("blind", "resnet50"),
            pretrained("colours", "resnet18"),
        ),
        told.append,
    )
    assert names(ranked) == ["resnet18", "resnet50"]
    best, other = ranked.ranking
    assert best.log_loss is not None and other.log_loss is not None
    assert best.log_loss < 0.1 < other.log_loss
    assert best.log_me is not None and other.log_me is not None
    assert best.log_me > other.log_me + 0.2
    assert (best.feature_dim, other.feature_dim) == (3, 64)
    assert best.image_ms == pytest.approx(4.0)
    assert best.weights == "random:0"
    assert ranked.images == 24
    assert ranked.explanation.startswith("resnet18 (random weights) is first: on 24 images")
    assert f"log loss {best.log_loss:.3f}, LogME {best.log_me:.3f}; then" in ranked.explanation
    assert {record.stage for record in told if isinstance(record, Progressed)} == {
        "preparing",
        "features",
    }


@pytest.mark.parametrize("cheap", ["resnet18", "resnet34"])
def test_of_what_is_too_close_to_call_the_cheaper_is_first(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told, cheap: str
) -> None:
    machine.each_s = {f"blind {name}": 0.004 for name in ("resnet18", "resnet34")}
    machine.each_s[f"blind {cheap}"] = 0.001
    folder = make_folder(per_class=15)
    named = [pretrained(f"blind {name}", name) for name in ("resnet18", "resnet34")]
    ranked = ranking.rank(spec(folder, *named), told.append)
    assert names(ranked)[0] == cheap
    assert f"{cheap} (random weights) is first" in ranked.explanation
    assert "30 images do not tell it from" in ranked.explanation
    chosen, _ = ranking.choose(spec(folder, *named), data.load(folder).train, machine, told.append)
    assert chosen.backbone == cheap


def test_images_that_are_measured_or_tested_on_are_not_looked_at(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told
) -> None:
    make_folder("both/train", per_class=5)
    make_folder("both/test", per_class=3, seed=2)
    folder = make_folder("both/val", per_class=7, seed=1).parent
    assert ranking.rank(spec(folder, pretrained("colours")), told.append).images == 10


def test_all_are_scored_on_more_images_only_where_all_find_time(
    make_folder: MakeFolder,
    pretrained: MakeBackbone,
    machine: Machine,
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranking, "ROUND_IMAGES", 10)
    monkeypatch.setattr(ranked_backbone, "_SLICE", 4)
    folder = make_folder(per_class=20)
    pair = (pretrained("colours"), pretrained("blind", "resnet34"))
    assert ranking.rank(spec(folder, *pair), told.append).images == 40

    machine.each_s = {"colours": 1.0, "blind": 1.0}
    # 8 runs each of one image, and 20 s for every 10 images: features may take 84 s.
    some = ranking.rank(spec(folder, *pair, time_budget_s=120), told.append)
    assert some.images == 30
    assert all(row.log_loss is not None for row in some.ranking)

    # The second turns slow when the first has seen 20: both are scored on the first 10.
    machine.slower_after = {"blind": sum(machine.sessions["blind"].batches) + 18}
    fewer = ranking.rank(spec(folder, *pair, time_budget_s=120), told.append)
    assert fewer.images == 10
    assert all(row.log_loss is not None for row in fewer.ranking)


def test_what_finds_no_time_is_listed_last_with_that_problem(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told
) -> None:
    machine.each_s = {"slow": 10.0}
    named = (pretrained("slow", "resnet152"), pretrained("colours", "resnet18"))
    folder = make_folder(per_class=6)
    ranked = ranking.rank(spec(folder, *named, time_budget_s=50), told.append)
    assert names(ranked) == ["resnet18", "resnet152"]
    assert ranked.ranking[0].log_loss is not None
    assert ranked.ranking[1] == RankedBackbone(
        backbone="resnet152", weights="random:0", problem=ranked_backbone.NO_TIME
    )
    assert machine.now <= 50 + 10
    machine.each_s = {"colours": 10.0}
    none = ranking.rank(spec(folder, *named, time_budget_s=50), told.append)
    assert [row.problem for row in none.ranking] == [ranked_backbone.NO_TIME] * 2
    assert none.explanation.startswith("No backbone could be scored.")


def test_the_cheapest_go_first_and_pretrained_ones_before_random_ones(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told
) -> None:
    named = (
        pretrained("a", "resnet50"),
        pretrained("b", "resnet18"),
        pretrained("c", "resnet18", ""),
        pretrained("d", "efficientnet_lite0"),
    )
    ranking.rank(spec(make_folder(per_class=2), *named), told.append)
    assert machine.loads == ["d", "c", "b", "a"]


def test_a_problem_of_one_candidate_is_its_own(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told, tmp_path: Path
) -> None:
    folder = make_folder(per_class=6)
    broken = pretrained("broken", "resnet34")
    machine.session("broken").fail_next = RuntimeError("kernel panic")
    ranked = ranking.rank(
        spec(
            folder,
            PretrainedBackbone(backbone="vgg16"),
            PretrainedBackbone(backbone="efficientnet_lite0", weights="IMAGENET1K_V1"),
            PretrainedBackbone(backbone="resnet50", weights="IMAGENET99"),
            broken,
            pretrained("colours"),
        ),
        told.append,
    )
    assert names(ranked) == ["resnet18", "vgg16", "efficientnet_lite0", "resnet50", "resnet34"]
    problems = [row.problem for row in ranked.ranking]
    assert problems[0] == ""
    assert "backbone 'vgg16' is none of" in problems[1]
    assert "has no weights 'IMAGENET1K_V1'" in problems[2]
    assert "has no weights 'IMAGENET99'" in problems[3]
    assert "kernel panic" in problems[4]
    assert ranked.explanation.startswith("resnet18 (random weights) is the only one")


def test_what_is_written_meanwhile_goes_into_the_folder_that_was_given(
    make_folder: MakeFolder,
    pretrained: MakeBackbone,
    machine: Machine,
    told: Told,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folders: list[Path] = []
    prepare = ranked_backbone.BackboneScoring.prepare

    def noted(
        self: ranked_backbone.BackboneScoring, part: data.Part, deadline: float, folder: Path
    ) -> None:
        folders.append(folder)
        prepare(self, part, deadline, folder)

    monkeypatch.setattr(ranked_backbone.BackboneScoring, "prepare", noted)
    work = tmp_path / "work"
    work.mkdir()
    asked = spec(make_folder(per_class=2), pretrained("colours"), work_dir=str(work))
    ranking.rank(asked, told.append)
    assert [folder.parent for folder in folders] == [work]
    assert list(work.iterdir()) == []


def test_a_job_that_chooses_its_backbone_works_in_its_own_folder(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[RankSpec] = []

    def choose(spec: RankSpec, *_: object) -> None:
        asked.append(spec)
        raise WrongState(Reason.WEIGHTS_UNAVAILABLE, "none")

    monkeypatch.setattr(ranking, "choose", choose)
    job = Job(
        JobSpec(
            job_id="job-1",
            model="birds",
            data=ImageSource(folder="/data"),
            out_dir=str(tmp_path),
            method=FeatureBased(),
            weights_dir="/weights",
            provider="cpu",
        ),
        told.append,
    )
    with pytest.raises(WrongState):
        job.choose_backbone(data.Part((), (), np.zeros(0, np.int64)))
    assert [spec.work_dir for spec in asked] == [str(tmp_path)]


def test_only_what_is_available_leaves_the_others_out_and_says_so(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told
) -> None:
    ranked = ranking.rank(
        spec(
            make_folder(per_class=6),
            pretrained("colours", "resnet18", ""),
            PretrainedBackbone(backbone="resnet50"),
            only_available=True,
        ),
        told.append,
    )
    assert names(ranked) == ["resnet18"]
    assert ranked.ranking[0].weights == "IMAGENET1K_V1"
    assert ranked.explanation.endswith("weights are not on this machine: resnet50.")


def test_int8_servers_measure_the_quantised_file_where_there_is_one(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told
) -> None:
    both = pretrained("float")
    (quantised,) = pretrained("quantised").exported
    both = PretrainedBackbone(
        backbone="resnet18",
        weights="random",
        exported=[*both.exported, ExportedBackbone("random:0:int8", quantised.digest)],
    )
    folder = make_folder(per_class=4)
    for precision, file in (("fp32", "float"), ("int8", "quantised")):
        ranking.rank(spec(folder, both, precision=precision), told.append)
        assert machine.loads[-1] == file


def test_features_are_kept_for_the_jobs_that_follow(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told, tmp_path: Path
) -> None:
    named = pretrained("colours")
    session = machine.session("colours")
    asked = spec(make_folder(per_class=6), named, feature_cache=str(tmp_path / "features.sqlite"))
    first = ranking.rank(asked, told.append)
    assert sum(session.batches) == 8 + 12
    again = ranking.rank(asked, told.append)
    # One image at a time to measure what it costs, and no more.
    assert sum(session.batches) == 8 + 12 + 8
    assert again.ranking[0].log_loss == first.ranking[0].log_loss


def test_images_of_one_class_or_none_that_is_readable_are_refused(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told
) -> None:
    with pytest.raises(InvalidInput, match="are of 1 class") as caught:
        ranking.rank(spec(make_folder(classes=("red",)), pretrained("colours")), told.append)
    assert caught.value.reason is Reason.DATASET_UNUSABLE
    empty = make_folder("empty", per_class=0)
    for label in ("blue", "red"):
        (empty / label / "a.png").write_bytes(b"no image")
    with pytest.raises(InvalidInput, match=r"no image was found among 2 files: 'blue/a\.png'"):
        ranking.rank(spec(empty, pretrained("colours")), told.append)


def test_choose_takes_the_first_on_a_jobs_own_training_images(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told
) -> None:
    folder = make_folder(per_class=10)
    part = data.load(folder).train
    named = [pretrained("blind", "resnet50"), pretrained("colours", "resnet18")]
    chosen, ranked = ranking.choose(spec(folder, *named), part, machine, told.append)
    assert chosen is named[1]
    assert ranked.images == 20
    with pytest.raises(WrongState, match="no backbone could be chosen") as caught:
        ranking.choose(
            spec(folder, PretrainedBackbone(backbone="vgg16")), part, machine, told.append
        )
    assert caught.value.reason is Reason.WEIGHTS_UNAVAILABLE


def test_without_time_for_any_score_the_cheapest_available_is_taken_and_that_is_said(
    make_folder: MakeFolder, pretrained: MakeBackbone, machine: Machine, told: Told, tmp_path: Path
) -> None:
    part = data.load(make_folder(per_class=6)).train
    named = [
        PretrainedBackbone(backbone="vgg16"),
        PretrainedBackbone(backbone="efficientnet_lite0", weights="random"),
        pretrained("dear", "resnet50"),
        pretrained("cheap", "resnet18"),
    ]
    short = spec(tmp_path / "none", *named, time_budget_s=0.0, only_available=True)
    chosen, ranked = ranking.choose(short, part, machine, told.append)
    assert chosen is named[3]
    assert all(row.log_me is None for row in ranked.ranking)
    (warning,) = [note for note in told if isinstance(note, Note) and note.level == "warning"]
    assert "no backbone could be scored: resnet18 (random weights) was taken" in warning.text
    assert "longer time budget" in warning.text


def test_real_weights_come_before_random_ones_on_ten_photos_a_class(
    tmp_path: Path, told: Told, default_forms: dict[str, Any]
) -> None:
    folder = photographs.folder("hymenoptera_data")
    for label in ("ants", "bees"):
        (tmp_path / "few" / label).mkdir(parents=True)
        for photo in sorted((folder / "train" / label).iterdir())[:10]:
            (tmp_path / "few" / label / photo.name).write_bytes(photo.read_bytes())
    ranked = ranking.rank(
        spec(
            tmp_path / "few",
            PretrainedBackbone(backbone="timm/test_resnet", weights="random"),
            PretrainedBackbone(backbone="resnet18", weights="random"),
            PretrainedBackbone(backbone="efficientnet_lite0", exported=default_forms["exported"]),
            files=default_forms["files"],
            time_budget_s=3600.0,
        ),
        told.append,
    )
    best, second, third = ranked.ranking
    assert [row.problem for row in ranked.ranking] == [""] * 3
    assert {second.backbone, third.backbone} == {"timm/test_resnet", "resnet18"}  # 160 and 224 px
    assert (best.backbone, best.weights) == ("efficientnet_lite0", LITE0)
    assert best.log_loss is not None and second.log_loss is not None
    assert best.log_loss < second.log_loss
    assert best.log_me is not None and second.log_me is not None
    assert best.log_me > second.log_me + 0.1
    assert best.feature_dim == 1280
