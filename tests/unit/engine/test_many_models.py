"""Several models in one call: what is decoded and run for them, and what each answers."""

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from service.domain import Decision, ImageDecoding
from service.engine.engine import AskedModel, Classified, Engine, ModelFiles, Outcome
from service.engine.preprocess import Encoded, Pixels
from service.errors import GraftError, InvalidInput, Reason
from service.ops.metrics import Metrics
from tests.fake_runtime import FakeRuntime
from tests.unit.engine.conftest import GUARD_S, MakeEngine, MakeModel, image
from tests.unit.engine.test_engine import best, until_waiting, value, wait_until_running


class Images:
    """Images that note how they are decoded."""

    def __init__(self) -> None:
        self.decoded: list[str] = []

    def __call__(self, colour: tuple[int, int, int], size: int = 224) -> "Noted":
        return Noted(self, np.full((size, size, 3), colour, np.uint8))


class Noted:
    def __init__(self, images: Images, pixels: Pixels) -> None:
        self._images, self._pixels = images, pixels

    def __call__(self, decoding: ImageDecoding) -> Pixels:
        self._images.decoded.append(decoding.framing)
        return self._pixels


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def images() -> Images:
    return Images()


async def asked(
    engine: Engine, models: Sequence[ModelFiles], images: Sequence[Noted | Encoded]
) -> list[list[Outcome]]:
    wanted = [AskedModel(files) for files in models]
    return await engine.classify_with(wanted, images, GUARD_S, finish=list)


async def test_models_on_one_backbone_share_its_run_and_each_answers_by_its_own_head(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, images: Images
) -> None:
    models = [make_model("a"), make_model("b", classes=("rot", "grün", "blau"))]
    first, second = await asked(make_engine(), models, [images(RED), images(BLUE)])
    assert [best(outcome) for outcome in first] == ["red", "blue"]
    assert [best(outcome) for outcome in second] == ["rot", "blau"]
    assert sum(runtime.session(models[0].backbone_digest).batches) == 2
    assert len(images.decoded) == 2


async def test_backbones_that_see_images_alike_share_their_decoding(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, images: Images
) -> None:
    models = [make_model("a", "b0"), make_model("b", "b1"), make_model("c", "b0")]
    answers = await asked(make_engine(), models, [images(RED)])
    assert [best(outcome) for (outcome,) in answers] == ["red"] * 3
    assert [runtime.session(each.backbone_digest).batches for each in models[:2]] == [[1], [1]]
    assert images.decoded == ["crop"]


async def test_an_image_is_decoded_once_for_each_framing(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, images: Images
) -> None:
    crop = make_model("a")
    whole = dataclasses.replace(make_model("b"), decoding=ImageDecoding(framing="whole"))
    await asked(make_engine(), [crop, whole, crop], [images(RED)])
    assert images.decoded == ["crop", "whole"]
    # Both are in the one run of the backbone.
    assert runtime.session(crop.backbone_digest).batches == [2]


async def test_an_image_that_cannot_be_decoded_fails_for_all_models_alike(
    make_engine: MakeEngine, make_model: MakeModel, metrics: Metrics
) -> None:
    models = [make_model("a", "b0"), make_model("b", "b1")]
    sent = [Encoded(lambda: b"no image"), Encoded(lambda: image("red"))]
    (bad, good), (also_bad, also_good) = await asked(make_engine(), models, sent)
    assert isinstance(bad, GraftError)
    assert also_bad is bad
    assert (best(good), best(also_good)) == ("red", "red")
    for model in ("a", "b"):
        for outcome in ("ok", "IMAGE_UNREADABLE"):
            assert value(metrics, "graft_images_total", model=model, outcome=outcome) == 1


async def test_a_model_that_is_named_twice_answers_twice_by_each_decision(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, images: Images
) -> None:
    model = make_model()
    never = Decision(rule="thresholds", default_threshold=1.0)
    ((plain,), (strict,)) = await make_engine().classify_with(
        [AskedModel(model), AskedModel(model, never)], [images((120, 130, 90))], GUARD_S,
        finish=list,
    )  # fmt: skip
    assert isinstance(plain, Classified)
    assert isinstance(strict, Classified)
    assert (plain.answer, strict.answer) == (1, -1)
    assert runtime.session(model.backbone_digest).batches == [1]


async def test_a_threshold_of_a_class_that_one_model_lacks_names_it(
    make_engine: MakeEngine, make_model: MakeModel, images: Images
) -> None:
    decision = Decision(rule="thresholds", thresholds={"red": 0.5})
    wanted = [
        AskedModel(make_model("a"), decision, "models[0].decision"),
        AskedModel(make_model("b", classes=("x", "y")), decision, "models[1].decision"),
    ]
    with pytest.raises(InvalidInput) as refused:
        await make_engine().classify_with(wanted, [images(RED)], GUARD_S, finish=list)
    assert refused.value.field == "models[1].decision.thresholds.classes"


async def test_a_backbone_that_takes_small_batches_gets_them(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, images: Images
) -> None:
    models = [make_model("a", "b0"), make_model("b", "b1")]
    small = runtime.session(models[1].backbone_digest)
    small.max_batch = 1
    engine = make_engine()
    held = runtime.session(make_model("c", "b2").backbone_digest)
    held.hold()
    busy = asyncio.create_task(asked(engine, [make_model("c", "b2")], [images(RED)]))
    await wait_until_running(runtime, make_model("c", "b2").backbone_digest)
    both = asyncio.create_task(asked(engine, models, [images(RED), images(BLUE)]))
    held.release()
    await asyncio.gather(busy, both)
    assert set(small.batches) == {1}
    assert sum(small.batches) == 2


async def test_a_run_that_fails_fails_the_call_and_no_other(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, images: Images
) -> None:
    models = [make_model("a", "b0"), make_model("b", "b1")]
    engine = make_engine()
    runtime.session(models[1].backbone_digest).fail_next = ZeroDivisionError("a fault")
    with pytest.raises(RuntimeError, match="a fault"):
        await asked(engine, models, [images(RED)])
    ((outcome,),) = await asked(engine, models[:1], [images(RED)])
    assert best(outcome) == "red"


async def test_of_a_call_that_is_left_no_more_backbones_are_run(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, images: Images
) -> None:
    models = [make_model("a", "b0"), make_model("b", "b1")]
    engine = make_engine()
    first = runtime.session(models[0].backbone_digest)
    first.hold()
    leaving = asyncio.create_task(asked(engine, models, [images(RED)]))
    await wait_until_running(runtime, models[0].backbone_digest)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    first.release()
    ((outcome,),) = await asked(engine, models[:1], [images(BLUE)])
    assert best(outcome) == "blue"
    assert runtime.session(models[1].backbone_digest).batches == []


async def test_each_model_of_a_call_is_counted_and_timed(
    make_engine: MakeEngine, make_model: MakeModel, metrics: Metrics, images: Images
) -> None:
    engine = make_engine()
    models = [make_model("a", "b0"), make_model("b", "b0"), make_model("c", "b1")]
    await asked(engine, models, [images(RED), images(BLUE)])
    for files in models:
        assert engine.ledger.of(files.model, files.version).images == 2
        for stage, count in {"decode": 2, "queue": 2, "infer": 2, "total": 1}.items():
            name = "graft_predict_stage_seconds_count"
            assert value(metrics, name, stage=stage, model=str(files.model)) == count
    with pytest.raises(InvalidInput):
        await engine.classify_with(
            [AskedModel(files) for files in models], [images(RED)], GUARD_S, finish=_refuse
        )
    assert [engine.ledger.of(files.model, 1).fail.count for files in models] == [1, 1, 1]


def _refuse(_: object) -> None:
    raise InvalidInput(Reason.INVALID_FIELD, "too many scores")


async def test_an_image_waits_in_the_queue_once_for_all_its_models(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, metrics: Metrics,
    images: Images,
) -> None:  # fmt: skip
    engine = make_engine()
    models = [make_model("a", "b0"), make_model("b", "b1")]
    held = runtime.session(models[0].backbone_digest)
    held.hold()
    running = asyncio.create_task(asked(engine, models[:1], [images(RED)]))
    await wait_until_running(runtime, models[0].backbone_digest)
    waiting = asyncio.create_task(asked(engine, models, [images(RED)] * 3))
    await until_waiting(metrics, 3)
    assert value(metrics, "graft_queue_depth") == 3
    held.release()
    await asyncio.gather(running, waiting)
