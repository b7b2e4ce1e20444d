"""A job's request is the message that came."""

from google.protobuf.duration_pb2 import Duration
from graftml_stubs.v1 import fine_tuning_pb2 as pb

from service.contract import Augmentation
from tests.rpc.conftest import Service, colours


def request(**fields: object) -> pb.FineTuneRequest:
    return pb.FineTuneRequest(model="colours", inline_images=colours(), **fields)  # type: ignore[arg-type]


async def test_every_hyperparameter_comes_back_as_it_was_asked(service: Service) -> None:
    asked = pb.ModelBased(
        recipe=pb.RECIPE_CLASSIC,
        epochs=3,
        batch_size=8,
        learning_rate=0.01,
        momentum=0.8,
        weight_decay=0.0,
        label_smoothing=0.05,
        train_from_stage="layer3",
        freeze_batch_norm=False,
        precision=pb.PRECISION_FP32,
    )
    varied = pb.Augmentation(mirror=False, min_scale=0.5, rotation_degrees=0, colour=0.2)
    started = await service.fine_tuning.FineTune(
        request(
            backbone="resnet18",
            weights="random",
            model_based=asked,
            augmentation=varied,
            validation_fraction=0.25,
            outlier_false_alarm_rate=0.001,
            seed=7,
            time_budget=Duration(seconds=90),
            device=pb.DEVICE_CPU,
            serving_precision=pb.SERVING_PRECISION_INT8,
        )
    )
    back = started.job.request
    assert (back.model_based, back.augmentation) == (asked, varied)
    assert (back.backbone, back.weights, back.seed) == ("resnet18", "random", 7)
    assert (back.validation_fraction, back.time_budget.seconds) == (0.25, 90)
    assert (back.device, back.outlier_false_alarm_rate) == (pb.DEVICE_CPU, 0.001)
    assert back.serving_precision == pb.SERVING_PRECISION_INT8
    await service.ended(started.job.job_id)
    spec = service.launcher.trainers[0].spec
    assert (spec.backbone, spec.seed, spec.device) == ("resnet18", 7, "cpu")
    assert spec.outlier_false_alarm_rate == 0.001
    assert (spec.precision, spec.is_precision_asked) == ("int8", True)
    assert spec.augmentation == Augmentation(
        mirror=False, min_scale=0.5, rotation_degrees=0.0, colour=0.2
    )


async def test_a_retry_may_name_labels_and_classes_in_another_order(service: Service) -> None:
    recalls = {"red": 0.5, "blue": 0.25}
    first = await service.fine_tuning.FineTune(
        request(request_id="once", labels={"b": "2", "a": "1"}, gate=pb.Gate(class_recalls=recalls))
    )
    recalls = dict(reversed(recalls.items()))
    again = await service.fine_tuning.FineTune(
        request(request_id="once", labels={"a": "1", "b": "2"}, gate=pb.Gate(class_recalls=recalls))
    )
    assert again.job.job_id == first.job.job_id
