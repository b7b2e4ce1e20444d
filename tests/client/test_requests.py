"""Options become requests; wrong ones are refused before anything is sent."""

from typing import Any, get_args

import graftml
import pytest
from google.protobuf.duration_pb2 import Duration
from graftml import _requests, types
from graftml.types import FineTuneOptions
from graftml_stubs.v1 import fine_tuning_pb2 as pb


def asked(options: Any, target: Any = "") -> pb.FineTuneRequest:
    return _requests.fine_tune("ds-1", "pets", {"request_id": "mine", **options}, target)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, pb.FineTuneRequest(auto=pb.Auto())),
        (
            {"backbone": "resnet50", "weights": "IMAGENET1K_V1", "seed": 7, "device": "cuda"},
            pb.FineTuneRequest(
                auto=pb.Auto(),
                backbone="resnet50",
                weights="IMAGENET1K_V1",
                seed=7,
                device=pb.DEVICE_CUDA,
            ),
        ),
        (
            {"validation_fraction": 0.25, "time_budget_s": 90.5, "labels": {"team": "blue"}},
            pb.FineTuneRequest(
                auto=pb.Auto(),
                validation_fraction=0.25,
                time_budget=Duration(seconds=90, nanos=500_000_000),
                labels={"team": "blue"},
            ),
        ),
        (
            {
                "background": "#20c040",
                "outlier_false_alarm_rate": 0.01,
                "framing": "whole",
                "serving_precision": "int8",
            },
            pb.FineTuneRequest(
                auto=pb.Auto(),
                background="#20c040",
                outlier_false_alarm_rate=0.01,
                framing=pb.FRAMING_WHOLE,
                serving_precision=pb.SERVING_PRECISION_INT8,
            ),
        ),
        (
            {"method": "feature_based", "augmented_views": 0},
            pb.FineTuneRequest(feature_based=pb.FeatureBased(augmented_views=0)),
        ),
        (
            {"method": graftml.FeatureBased(l2=0.01, augmented_views=4)},
            pb.FineTuneRequest(feature_based=pb.FeatureBased(l2=0.01, augmented_views=4)),
        ),
        (
            {"baselines": ("linear_probe", "from_scratch"), "case_sensitive_labels": True},
            pb.FineTuneRequest(
                auto=pb.Auto(),
                baselines=[pb.BASELINE_LINEAR_PROBE, pb.BASELINE_FROM_SCRATCH],
                case_sensitive_labels=True,
            ),
        ),
        (
            {
                "gate": graftml.Gate(
                    min_accuracy=0.0,
                    min_class_recall=0.5,
                    class_recalls={"ants": 0.9, "bees": 0.0},
                    not_worse_than="prod",
                    max_regression=0.0,
                    when_uncertain="promote",
                    max_parity_difference=1e-6,
                    max_latency_ms=12.5,
                    alias="canary",
                )
            },
            pb.FineTuneRequest(
                auto=pb.Auto(),
                gate=pb.Gate(
                    min_accuracy=0.0,
                    min_class_recall=0.5,
                    class_recalls={"ants": 0.9, "bees": 0.0},
                    not_worse_than="prod",
                    max_regression=0.0,
                    when_uncertain=pb.WHEN_UNCERTAIN_PROMOTE,
                    max_parity_difference=1e-6,
                    max_latency=Duration(nanos=12_500_000),
                    alias="canary",
                ),
            ),
        ),
        (
            {"grouping": graftml.Grouping(folder_level=1), "augmentation": graftml.Augmentation()},
            pb.FineTuneRequest(
                auto=pb.Auto(),
                grouping=pb.Grouping(folder_level=1),
                augmentation=pb.Augmentation(),
            ),
        ),
        (
            {
                "augmentation": graftml.Augmentation(
                    mirror=False,
                    min_scale=0.5,
                    rotation_degrees=0.0,
                    colour=0.2,
                    trivial_augment=True,
                )
            },
            pb.FineTuneRequest(
                auto=pb.Auto(),
                augmentation=pb.Augmentation(
                    mirror=False,
                    min_scale=0.5,
                    rotation_degrees=0.0,
                    colour=0.2,
                    trivial_augment=True,
                ),
            ),
        ),
        (
            {"base": graftml.BaseVersion(version=2, model="cats")},
            pb.FineTuneRequest(auto=pb.Auto(), base=pb.BaseVersion(version=2, model="cats")),
        ),
        (
            {"method": "model_based", "recipe": "classic", "epochs": 3, "freeze_batch_norm": False},
            pb.FineTuneRequest(
                model_based=pb.ModelBased(
                    recipe=pb.RECIPE_CLASSIC, epochs=3, freeze_batch_norm=False
                )
            ),
        ),
        (
            {
                "method": graftml.ModelBased(
                    epochs=2,
                    batch_size=4,
                    learning_rate=0.001,
                    momentum=0.9,
                    weight_decay=0.0,
                    label_smoothing=0.1,
                    train_from_stage="layer4",
                    freeze_batch_norm=True,
                    precision="bf16",
                )
            },
            pb.FineTuneRequest(
                model_based=pb.ModelBased(
                    recipe=pb.RECIPE_AUTO,
                    epochs=2,
                    batch_size=4,
                    learning_rate=0.001,
                    momentum=0.9,
                    weight_decay=0.0,
                    label_smoothing=0.1,
                    train_from_stage="layer4",
                    freeze_batch_norm=True,
                    precision=pb.PRECISION_BF16,
                )
            ),
        ),
    ],
)
def test_options_become_the_fields_of_the_request(
    options: FineTuneOptions, expected: pb.FineTuneRequest
) -> None:
    expected.MergeFrom(pb.FineTuneRequest(model="pets", dataset_id="ds-1", request_id="mine"))
    assert asked(options) == expected


@pytest.mark.parametrize("technique", list(_requests.TECHNIQUES))
def test_a_domain_adaptation_becomes_the_fields_of_the_request(technique: Any) -> None:
    method = graftml.DomainAdaptation(
        target="ds-2",
        technique=technique,
        always_adapt=True,
        evaluate_on_target=True,
        epochs=3,
        batch_size=8,
        learning_rate=0.01,
    )
    sent = asked({"method": method}, "ds-2").domain_adaptation
    assert sent == pb.DomainAdaptation(
        target_dataset_id="ds-2",
        technique=_requests.TECHNIQUES[technique],
        always_adapt=True,
        evaluate_on_target=True,
        epochs=3,
        batch_size=8,
        learning_rate=0.01,
    )
    there = asked({"method": method}, graftml.ServerPath("/target")).domain_adaptation
    assert there.target_path.path == "/target"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (graftml.FeatureBased, pb.FeatureBased),
        (graftml.ModelBased, pb.ModelBased),
        (graftml.DomainAdaptation, pb.DomainAdaptation),
        (graftml.Augmentation, pb.Augmentation),
        (graftml.Grouping, pb.Grouping),
    ],
)
def test_the_client_knows_every_field_of_the_contract(kind: Any, message: Any) -> None:
    images = {"target_path", "target_dataset_id", "target_images"}
    fields = set(message.DESCRIPTOR.fields_by_name) - images
    assert set(kind.__dataclass_fields__) - {"target"} == fields


def test_every_technique_and_baseline_of_the_contract_can_be_asked_for() -> None:
    assert {0, *_requests.TECHNIQUES.values()} == set(pb.AdaptationTechnique.values())
    assert {0, *_requests.BASELINES.values()} == set(pb.Baseline.values())
    assert set(_requests.TECHNIQUES) == set(get_args(types.Technique))
    assert set(_requests.BASELINES) == set(get_args(types.Baseline))


def test_the_hyperparameters_of_a_domain_adaptation_may_stand_beside_its_name() -> None:
    options: FineTuneOptions = {
        "method": "domain_adaptation",
        "target": "ds-2",
        "technique": "coral",
        "always_adapt": True,
    }
    assert asked(options, "ds-2").domain_adaptation == pb.DomainAdaptation(
        target_dataset_id="ds-2",
        technique=pb.ADAPTATION_TECHNIQUE_CORAL,
        always_adapt=True,
    )


@pytest.mark.parametrize(
    ("base", "sent"),
    [
        (2, pb.BaseVersion(version=2)),
        ("prod", pb.BaseVersion(alias="prod")),
        (graftml.BaseVersion(), pb.BaseVersion()),
    ],
)
def test_a_base_may_be_a_version_or_an_alias_alone(base: Any, sent: pb.BaseVersion) -> None:
    request = asked({"base": base})
    assert request.HasField("base")
    assert request.base == sent


@pytest.mark.parametrize(
    ("grouping", "sent"),
    [
        (2, pb.Grouping(folder_level=2)),
        ("{group}_*.jpg", pb.Grouping(name_pattern="{group}_*.jpg")),
    ],
)
def test_groups_may_be_a_level_or_a_pattern_alone(grouping: Any, sent: pb.Grouping) -> None:
    assert asked({"grouping": grouping}).grouping == sent


def test_what_is_not_given_is_left_to_the_service() -> None:
    request = _requests.fine_tune(graftml.ServerPath("/images"), "pets", {})
    assert request.server_path.path == "/images"
    fields = ("validation_fraction", "seed", "time_budget", "gate", "base", "grouping")
    for field in (*fields, "outlier_false_alarm_rate", "augmentation"):
        assert not request.HasField(field)
    assert (request.backbone, list(request.baselines)) == ("", [])
    assert request.WhichOneof("method") == "auto"
    assert not _requests.fine_tune("ds-1", "pets", {"gate": graftml.Gate()}).gate.HasField(
        "max_regression"
    )
    head = _requests.fine_tune("ds-1", "pets", {"method": "feature_based"}).feature_based
    assert not head.HasField("l2")
    assert not head.HasField("augmented_views")


def test_every_request_has_an_id_of_its_own() -> None:
    first, second = (_requests.fine_tune("ds-1", "pets", {}) for _ in range(2))
    assert first.request_id
    assert first.request_id != second.request_id
    assert _requests.fine_tune("ds-1", "pets", {"request_id": "mine"}).request_id == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"epochs": 3},
            "epochs is a hyperparameter of model_based and domain_adaptation, not of auto: "
            "set method='model_based' or method='domain_adaptation', or leave epochs out",
        ),
        ({"method": "domain_adaptation"}, "domain_adaptation needs the target"),
        (
            {"target": "ds-2", "technique": "coral"},
            "target, technique are hyperparameters of domain_adaptation, not of auto: "
            "set method='domain_adaptation'",
        ),
        ({"target": "ds-2", "l2": 1.0, "method": "model_based"}, "target is a hyperparameter of"),
        ({"method": "domain_adaptation", "target": "ds-2", "l2": 1.0}, "l2 is a hyperparameter"),
        (
            {"method": "domain_adaptation", "target": "ds-2", "technique": "magic"},
            "technique is 'magic': it must be one of auto, coral, mcc",
        ),
        ({"baselines": ["magic"]}, "baselines is 'magic': it must be one of linear_probe"),
        ({"base": graftml.BaseVersion(version=1, alias="prod")}, "give one"),
        ({"method": "model_based", "l2": 1.0}, "l2 is a hyperparameter of feature_based"),
        ({"method": graftml.FeatureBased(), "l2": 1.0}, "l2 stand beside a FeatureBased"),
        ({"method": "magic"}, "method is 'magic': it must be one of auto, feature_based"),
        ({"grouping": graftml.Grouping()}, "grouping needs either folder_level"),
        (
            {"grouping": graftml.Grouping(folder_level=1, name_pattern="{group}_*")},
            "grouping needs either folder_level",
        ),
        ({"gate": graftml.Gate(when_uncertain="ask")}, "when_uncertain is 'ask'"),  # type: ignore[arg-type]
        ({"device": "tpu"}, "device is 'tpu': it must be one of auto, cpu, cuda"),
        ({"epoch": 3}, "fine_tune takes no epoch"),
        ({"method": graftml.ModelBased(recipe="best")}, "recipe is 'best'"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_option_is_named_before_anything_is_sent(
    options: Any, message: str, connect: Any
) -> None:
    with pytest.raises(graftml.InvalidArgument) as caught:
        connect("localhost:1").fine_tune("ds-1", "pets", **options)
    assert message in str(caught.value)


def test_a_version_and_an_alias_at_once_are_refused(connect: Any) -> None:
    with pytest.raises(graftml.InvalidArgument, match="give one"):
        connect("localhost:1").get_version("pets", version=1, alias="prod")


@pytest.mark.parametrize("target", ["http://localhost:50051", "grpc://localhost:50051/"])
def test_an_address_with_a_scheme_is_refused_with_the_right_one(connect: Any, target: str) -> None:
    with pytest.raises(graftml.InvalidArgument, match="leave out the scheme, 'localhost:50051'"):
        connect(target)
