import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.backbones import BACKBONES
from service.contract import (
    BASELINES,
    NETWORK_TECHNIQUES,
    Augmentation,
    Auto,
    Base,
    DomainAdaptation,
    FeatureBased,
    Gate,
    Grouping,
    Method,
    ModelBased,
)
from service.domain import Decision, VersionSource
from service.errors import GraftError, InvalidInput, NotAllowed, NotFound, Reason
from service.jobs.request import JobRequest, allowed_path, check_request_id
from tests.unit.jobs.conftest import request
from tests.unit.storage.conftest import TENANT

NAN, INF = math.nan, math.inf


def field_of(asked: JobRequest) -> str:
    with pytest.raises(InvalidInput) as caught:
        asked.check()
    assert caught.value.reason is Reason.INVALID_FIELD
    return caught.value.field


def test_the_smallest_request_is_fine() -> None:
    request().check()
    JobRequest(tenant=TENANT, model="birds", dataset_id="ds-1").check()


@pytest.mark.parametrize("backbone", ["", "auto", *BACKBONES])
def test_every_backbone_and_none_is_fine(backbone: str) -> None:
    asked = request(backbone=backbone)
    asked.check()
    assert asked.backbone_or("resnet18") == (backbone or "resnet18")


def test_all_fields_at_their_bounds_are_fine() -> None:
    for method in (
        FeatureBased(l2=1e-12, augmented_views=16),
        ModelBased(
            epochs=1, batch_size=4096, learning_rate=1e-9, momentum=0.0, weight_decay=0.0,
            label_smoothing=0.999, train_from_stage="layer4", precision="fp16",
        ),
        ModelBased(epochs=10_000, batch_size=1, momentum=0.999, train_from_stage="stem"),
    ):  # fmt: skip
        request(
            backbone="resnet50",
            weights="IMAGENET1K_V1",
            method=method,
            validation_fraction=0.05,
            seed=-(2**63),
            time_budget_s=1.0,
            labels={"k" * 63: "v" * 255, **{str(n): "" for n in range(31)}},
            background="#00ffAA",
        ).check()
    request(validation_fraction=0.5, seed=2**63 - 1).check()
    for technique in NETWORK_TECHNIQUES:
        for size in (2, 4096):
            method = DomainAdaptation(
                technique=technique, epochs=1, batch_size=size, learning_rate=1e-9
            )
            request(method=method, target_path="/data/target").check()
    for gate in (
        Gate(),
        Gate(min_accuracy=0.0, not_worse_than="latest", max_parity_difference=1e-9, alias="prod"),
        Gate(min_accuracy=1.0, not_worse_than="prod", max_latency_ms=0.001),
        Gate(not_worse_than="prod", max_regression=0.0, when_uncertain="promote"),
        Gate(not_worse_than="prod", max_regression=0.5),
        Gate(min_class_recall=0.0, class_recalls={"x" * 128: 1.0}),
        Gate(min_class_recall=1.0, class_recalls={str(n): 0.0 for n in range(1000)}),
    ):
        request(gate=gate, baselines=list(BASELINES)).check()
    for groups in (Grouping(folder_level=1), Grouping(name_pattern="{group}_*.jpg")):
        request(grouping=groups).check()
    for scale, rotation, colour in ((0.05, 0.0, 0.0), (1.0, 180.0, 1.0)):
        varied = Augmentation(min_scale=scale, rotation_degrees=rotation, colour=colour)
        request(augmentation=varied).check()


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("model", {"model": "Birds"}),
        ("backbone", {"backbone": "vgg16"}),
        ("weights", {"weights": "../etc/passwd"}),
        ("weights", {"weights": "x" * 65}),
        *[("validation_fraction", {"validation_fraction": x}) for x in (0.049, 0.51, NAN, INF)],
        *[
            ("outlier_false_alarm_rate", {"outlier_false_alarm_rate": x})
            for x in (0.0009, 0.501, NAN, INF)
        ],
        ("seed", {"seed": 2**63}),
        *[("time_budget", {"time_budget_s": x}) for x in (0.5, -1.0, NAN, INF)],
        ("labels", {"labels": {str(n): "" for n in range(33)}}),
        *[("background", {"background": x}) for x in ("white", "#fff", "#gggggg", "#ffffff0")],
        *[
            (f"augmentation.{name}", {"augmentation": Augmentation(**{name: x})})
            for name, low, high in (
                ("min_scale", 0.049, 1.01),
                ("rotation_degrees", -1, 181),
                ("colour", -0.1, 1.1),
            )
            for x in (low, high, NAN, INF)
        ],
        ("labels", {"labels": {"": "x"}}),
        ("labels", {"labels": {"k" * 64: "x"}}),
        ("labels[k]", {"labels": {"k": "x" * 256}}),
        (
            "decision.thresholds.classes[ant]",
            {"decision": Decision(rule="thresholds", thresholds={"ant": 2.0})},
        ),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_by_its_name(
    field: str, changes: dict[str, object]
) -> None:
    values = {"tenant": TENANT, "model": "birds", "server_path": "/data", **changes}
    assert field_of(JobRequest(**values)) == field  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "gate"),
    [
        *[("min_accuracy", Gate(min_accuracy=x)) for x in (-0.1, 1.1, NAN)],
        *[("min_class_recall", Gate(min_class_recall=x)) for x in (-0.1, 1.1, NAN)],
        *[("class_recalls[cat]", Gate(class_recalls={"cat": x})) for x in (-0.1, 1.1, NAN)],
        *[("class_recalls", Gate(class_recalls={x: 0.5})) for x in ("", "a/b", "x" * 129)],
        ("class_recalls", Gate(class_recalls={str(n): 0.5 for n in range(1001)})),
        *[
            ("max_regression", Gate(not_worse_than="prod", max_regression=x))
            for x in (-0.01, 0.51, NAN)
        ],
        *[("max_parity_difference", Gate(max_parity_difference=x)) for x in (0.0, -1.0, INF)],
        *[("max_latency", Gate(max_latency_ms=x)) for x in (0.0, -5.0, INF)],
        *[("not_worse_than", Gate(not_worse_than=x)) for x in ("Prod", "7", "-x")],
        *[("alias", Gate(alias=x)) for x in ("latest", "7", "Prod", "a" * 64)],
    ],
)
def test_a_gate_that_makes_no_sense_is_refused_by_its_name(field: str, gate: Gate) -> None:
    assert field_of(request(gate=gate)) == f"gate.{field}"


def test_a_baseline_is_named_once() -> None:
    assert field_of(request(baselines=["linear_probe", "linear_probe"])) == "baselines"


@pytest.mark.parametrize("views", [-1, 17])
def test_a_number_of_augmented_views_that_is_out_of_bounds_is_refused(views: int) -> None:
    asked = request(method=FeatureBased(augmented_views=views))
    assert field_of(asked) == "feature_based.augmented_views"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", 10_001), ("batch_size", 1), ("batch_size", 4097),
        ("learning_rate", 0.0), ("learning_rate", NAN),
    ],
)  # fmt: skip
def test_a_bad_number_of_an_adaptation_is_refused_by_its_name(name: str, value: float) -> None:
    method = DomainAdaptation(technique="cdan", **{name: value})  # type: ignore[arg-type]
    asked = request(method=method, target_path="/data/target")
    assert field_of(asked) == f"domain_adaptation.{name}"


@pytest.mark.parametrize("technique", ["auto", "coral", "mcc", "pseudo_labels"])
@pytest.mark.parametrize(("name", "value"), [("epochs", 3), ("batch_size", 8),
                                             ("learning_rate", 0.1)])  # fmt: skip
def test_a_technique_that_trains_a_head_alone_takes_no_training_settings(
    technique: str, name: str, value: float
) -> None:
    method = DomainAdaptation(technique=technique, **{name: value})  # type: ignore[arg-type]
    asked = request(method=method, target_path="/data/target")
    assert field_of(asked) == f"domain_adaptation.{name}"


def test_an_adaptation_needs_a_target() -> None:
    assert field_of(request(method=DomainAdaptation())) == "domain_adaptation.target"
    for target in ({"target_path": "/data/target"}, {"target_dataset_id": "ds-2"}):
        request(method=DomainAdaptation(), **target).check()


@pytest.mark.parametrize(
    ("field", "groups"),
    [
        ("grouping", Grouping()),
        ("grouping.folder_level", Grouping(folder_level=33)),
        ("grouping.name_pattern", Grouping(name_pattern="*.jpg")),
    ],
)
def test_groups_that_no_name_tells_are_refused(field: str, groups: Grouping) -> None:
    assert field_of(request(grouping=groups)) == field


@pytest.mark.parametrize(
    "method", [FeatureBased(), *(DomainAdaptation(technique=t) for t in ("auto", "coral"))]
)
def test_an_augmentation_that_varies_no_image_is_refused(method: Method) -> None:
    varied = Augmentation(mirror=False)
    with pytest.raises(InvalidInput, match="varies no image") as caught:
        request(method=method, augmentation=varied).check_augments()
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_FIELD, "augmentation")
    with pytest.raises(InvalidInput):
        request(method=method, augmentation=varied, baselines=["linear_probe"]).check_augments()
    # What says nothing asks for nothing, and a baseline may be what learns from images.
    for augmentation in (None, Augmentation()):
        request(method=method, augmentation=augmentation).check_augments()
    request(method=method, augmentation=varied, baselines=["from_scratch"]).check_augments()


@pytest.mark.parametrize(
    "method",
    [
        Auto(), ModelBased(), FeatureBased(augmented_views=1),
        *(DomainAdaptation(technique=t) for t in NETWORK_TECHNIQUES),
    ],
)  # fmt: skip
def test_an_augmentation_goes_with_what_varies_images(method: Method) -> None:
    request(method=method, augmentation=Augmentation(mirror=False)).check_augments()


@pytest.mark.parametrize("l2", [0.0, -1.0, NAN, INF])
def test_a_penalty_that_is_not_above_zero_is_refused(l2: float) -> None:
    assert field_of(request(method=FeatureBased(l2=l2))) == "feature_based.l2"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0), ("epochs", 10_001), ("batch_size", 0), ("batch_size", 4097),
        ("learning_rate", 0.0), ("learning_rate", NAN), ("learning_rate", INF),
        ("momentum", -0.1), ("momentum", 1.0), ("weight_decay", -1.0), ("weight_decay", INF),
        ("label_smoothing", 1.0),
        ("train_from_stage", "stage9"), ("train_from_stage", "layer1"),
    ],
)  # fmt: skip
def test_a_bad_hyperparameter_is_refused_by_its_name(name: str, value: float | str) -> None:
    asked = request(method=ModelBased(**{name: value}))  # type: ignore[arg-type]
    assert field_of(asked) == f"model_based.{name}"


def test_a_stage_is_one_of_the_backbone_that_is_meant() -> None:
    asked = request(method=ModelBased(train_from_stage="layer2"))
    asked.check(default_backbone="resnet18")
    with pytest.raises(InvalidInput, match="stage1"):
        asked.check(default_backbone="efficientnet_lite0")


def test_a_stage_of_the_backbone_that_is_chosen_later_is_left_to_the_trainer() -> None:
    request(backbone="auto", method=ModelBased(train_from_stage="stage9")).check()


def test_a_backbone_that_is_chosen_later_brings_its_own_weights() -> None:
    assert field_of(request(backbone="auto", weights="random")) == "weights"


def test_half_precision_on_the_cpu_is_refused() -> None:
    asked = request(device="cpu", method=ModelBased(precision="fp16"))
    assert field_of(asked) == "model_based.precision"


@pytest.mark.parametrize("changes", [{"server_path": ""}, {"dataset_id": "ds-1"}])
def test_the_images_come_from_one_place(changes: dict[str, str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        request(**changes).check()
    assert caught.value.field == "data"


def test_a_request_is_the_same_after_it_was_kept() -> None:
    for method in (
        Auto(),
        FeatureBased(l2=0.1, augmented_views=2),
        ModelBased(epochs=3, recipe="classic"),
        DomainAdaptation(technique="cdan", epochs=2, evaluate_on_target=True),
    ):
        asked = request(
            method=method, labels={"a": "b"}, seed=0, time_budget_s=9.5, target_path="/t",
            baselines=["from_scratch"], gate=Gate(min_accuracy=0.5, alias="prod"),
            base=Base("birds", 2), base_sources=[VersionSource("source", "ds-1")],
            background="#000000",
            grouping=Grouping(name_pattern="{group}_*"), augmentation=Augmentation(mirror=False),
            decision=Decision(rule="thresholds", thresholds={"ant": 0.5}, default_threshold=0.25),
        )  # fmt: skip
        assert msgspec.json.decode(msgspec.json.encode(asked), type=JobRequest) == asked


def test_a_request_id_has_a_bound() -> None:
    check_request_id("x" * 128)
    with pytest.raises(InvalidInput):
        check_request_id("x" * 129)


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    folder = tmp_path / "allowed"
    (folder / "birds").mkdir(parents=True)
    (folder / "birds.zip").write_bytes(b"")
    (tmp_path / "secret").mkdir()
    (tmp_path / "allowed-not").mkdir()
    return folder


@pytest.mark.parametrize("name", ["birds", "birds.zip", "birds/", "./birds/../birds"])
def test_a_path_in_an_allowed_folder_is_taken(allowed: Path, name: str) -> None:
    found = allowed_path(f"{allowed}/{name}", (allowed,))
    assert found in (allowed / "birds", allowed / "birds.zip")


def test_a_link_within_the_allowed_folder_is_followed(allowed: Path) -> None:
    (allowed / "link").symlink_to("birds")
    assert allowed_path(str(allowed / "link"), (allowed,)) == allowed / "birds"


def test_an_allowed_folder_may_be_a_link_itself(allowed: Path, tmp_path: Path) -> None:
    (tmp_path / "mount").symlink_to(allowed)
    assert allowed_path(f"{tmp_path}/mount/birds", (tmp_path / "mount",)) == allowed / "birds"


@pytest.mark.parametrize(
    "name", ["../secret", "../allowed-not", "out", "out/x", "loop", "birds/../../secret", "../none"]
)
def test_a_path_that_leads_outside_is_refused_whether_it_exists_or_not(
    allowed: Path, name: str
) -> None:
    (allowed / "out").symlink_to("../secret")
    (allowed / "loop").symlink_to("loop")
    asked = f"{allowed}/{name}"
    with pytest.raises(NotAllowed) as caught:
        allowed_path(asked, (allowed,))
    assert caught.value.reason is Reason.PATH_NOT_ALLOWED
    assert "secret" not in caught.value.message.replace(asked, "")


def test_no_allowed_folder_means_none(allowed: Path) -> None:
    with pytest.raises(NotAllowed):
        allowed_path(str(allowed), ())


def test_a_path_with_nothing_behind_it_is_told(allowed: Path) -> None:
    (allowed / "dangling").symlink_to("nothing")
    for name in ("nothing", "dangling", "birds.zip/x"):
        with pytest.raises(NotFound) as caught:
            allowed_path(str(allowed / name), (allowed,))
        assert caught.value.reason is Reason.PATH_NOT_FOUND


@pytest.mark.parametrize("path", ["", "birds", "./birds", "~/birds", "/a\0b", "/" + "x" * 5000])
def test_a_path_that_is_not_absolute_is_refused(allowed: Path, path: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        allowed_path(path, (allowed,))
    assert caught.value.field == "server_path.path"


@given(st.lists(st.sampled_from(["..", ".", "birds", "secret", "x" * 300, "~"]), max_size=8))
def test_whatever_the_path_the_answer_lies_inside_or_is_an_error(parts: list[str]) -> None:
    root = Path(__file__).parent
    try:
        found = allowed_path("/".join([str(root), *parts]), (root,))
    except GraftError:
        return
    assert found.is_relative_to(root)
