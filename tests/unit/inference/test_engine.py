import asyncio
from functools import partial

import numpy as np
import pytest

from service.errors import Damaged, Exhausted, Expired, GraftError, Reason
from service.inference import preprocess
from service.inference.engine import Classified, Decode
from service.inference.fake_runtime import FakeRuntime
from service.telemetry import Telemetry
from tests.unit.inference.conftest import MakeEngine, MakeModel, picture


def encoded(colour: str) -> Decode:
    return partial(preprocess.decode, picture(colour))


def best(outcome: Classified | GraftError) -> str:
    assert isinstance(outcome, Classified)
    return outcome.classes[int(outcome.probabilities.argmax())]


def value(telemetry: Telemetry, name: str, **labels: str) -> float:
    found = telemetry.registry.get_sample_value(name, labels)
    return 0.0 if found is None else found


async def wait_until_running(runtime: FakeRuntime, model_path: object) -> None:
    session = runtime.session(model_path)  # type: ignore[arg-type]
    assert await asyncio.to_thread(session.running.acquire, timeout=10)


async def test_each_picture_gets_the_class_of_its_own_colour(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    outcomes = await make_engine().classify(
        make_model(), [encoded(c) for c in ("blue", "red", "lime")], 5
    )
    assert [best(o) for o in outcomes] == ["blue", "red", "green"]
    assert all(
        isinstance(o, Classified) and abs(o.probabilities.sum() - 1) < 1e-5 for o in outcomes
    )


async def test_a_bad_picture_fails_alone(make_engine: MakeEngine, make_model: MakeModel) -> None:
    bad = partial(preprocess.decode, b"no picture")
    good, failed = await make_engine().classify(make_model(), [encoded("red"), bad], 5)
    assert best(good) == "red"
    assert isinstance(failed, GraftError)
    assert failed.reason is Reason.PICTURE_UNREADABLE


async def test_arrivals_for_different_models_while_busy_form_one_batch(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine = make_engine()
    models = [make_model(f"m{i}") for i in range(5)]
    session = runtime.session(models[0].backbone_path)
    session.hold()
    first = asyncio.create_task(engine.classify(models[0], [encoded("red")], 5))
    await wait_until_running(runtime, models[0].backbone_path)
    others = [asyncio.create_task(engine.classify(m, [encoded("blue")], 5)) for m in models[1:]]
    while value(engine._telemetry, "graft_queue_depth") < 4:  # noqa: ASYNC110 - decodes in threads
        await asyncio.sleep(0)
    session.release()
    assert best((await first)[0]) == "red"
    assert [best((await o)[0]) for o in others] == ["blue"] * 4
    assert session.batches == [1, 4]
    assert len(runtime.loads) == 1


async def test_a_batch_never_passes_its_bound(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    model = make_model()
    await make_engine(max_batch=3).classify(model, [encoded("red")] * 10, 5)
    assert max(runtime.session(model.backbone_path).batches) <= 3
    assert sum(runtime.session(model.backbone_path).batches) == 10


async def test_more_pictures_than_the_queue_holds_are_refused_with_a_retry_time(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine, model = make_engine(max_queue=2), make_model()
    session = runtime.session(model.backbone_path)
    session.hold()
    accepted = asyncio.create_task(engine.classify(model, [encoded("red")] * 2, 5))
    await wait_until_running(runtime, model.backbone_path)
    with pytest.raises(Exhausted) as refused:
        await engine.classify(model, [encoded("red")], 5)
    assert refused.value.reason is Reason.QUEUE_FULL
    assert refused.value.retry_after_s
    session.release()
    assert [best(o) for o in await accepted] == ["red", "red"]
    assert [best(o) for o in await engine.classify(model, [encoded("blue")], 5)] == ["blue"]


async def test_a_call_ends_at_its_deadline_and_its_pictures_leave_the_queue(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine, model = make_engine(), make_model()
    session = runtime.session(model.backbone_path)
    session.hold()
    busy = asyncio.create_task(engine.classify(model, [encoded("red")], 5))
    await wait_until_running(runtime, model.backbone_path)
    with pytest.raises(Expired):
        await engine.classify(model, [encoded("blue")] * 3, 0.05)
    session.release()
    await busy
    await engine.classify(model, [encoded("red")], 5)
    assert sum(session.batches) == 2, "the expired pictures were run"


async def test_a_cancelled_call_does_not_hurt_the_others_of_its_batch(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine, model = make_engine(), make_model()
    session = runtime.session(model.backbone_path)
    session.hold()
    leaving = asyncio.create_task(engine.classify(model, [encoded("red")], 5))
    await wait_until_running(runtime, model.backbone_path)
    staying = asyncio.create_task(engine.classify(model, [encoded("blue")], 5))
    leaving.cancel()
    session.release()
    assert best((await staying)[0]) == "blue"
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_a_failed_run_fails_its_batch_and_not_the_next_one(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine, model = make_engine(), make_model()
    runtime.session(model.backbone_path).fail_next = RuntimeError("kernel")
    with pytest.raises(RuntimeError, match="kernel"):
        await engine.classify(model, [encoded("red")], 5)
    assert best((await engine.classify(model, [encoded("red")], 5))[0]) == "red"


async def test_a_missing_backbone_is_a_damaged_model_and_may_be_tried_again(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine, model = make_engine(), make_model()
    model.backbone_path.unlink()
    with pytest.raises(Damaged):
        await engine.classify(model, [encoded("red")], 5)
    model.backbone_path.touch()
    assert best((await engine.classify(model, [encoded("red")], 5))[0]) == "red"


async def test_concurrent_first_calls_share_one_load(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine, model = make_engine(), make_model()
    await asyncio.gather(*(engine.classify(model, [encoded("red")], 5) for _ in range(8)))
    assert len(runtime.loads) == 1


async def test_least_recently_used_backbones_leave_and_come_back(
    make_engine: MakeEngine,
    make_model: MakeModel,
    runtime: FakeRuntime,
    telemetry: Telemetry,
) -> None:
    runtime._nbytes = 10_000
    engine = make_engine(max_bytes=25_000)
    models = [make_model(f"m{i}", f"b{i}") for i in range(3)]
    for model in (*models, models[0]):
        assert best((await engine.classify(model, [encoded("red")], 5))[0]) == "red"
        assert engine._memory.nbytes <= 25_000
    assert [path.stem for path in runtime.loads] == ["b0", "b1", "b2", "b0"]
    assert value(telemetry, "graft_evictions_total", kind="backbone") == 2


async def test_a_head_that_does_not_fit_its_backbone_is_refused(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    model = make_model()
    runtime.session(model.backbone_path).feature_dim = 5
    with pytest.raises(Damaged):
        await make_engine().warm(model)


async def test_features_are_the_backbones_own(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    (outcome,) = await make_engine().classify(make_model(), [encoded("blue")], 5)
    assert isinstance(outcome, Classified)
    np.testing.assert_allclose(outcome.features, [0, 0, 1], atol=1e-6)


async def test_every_stage_of_a_picture_is_measured(
    make_engine: MakeEngine, make_model: MakeModel, telemetry: Telemetry
) -> None:
    await make_engine().classify(make_model(), [encoded("red")], 5)
    for stage in ("decode", "queue", "infer", "total"):
        count = "graft_predict_stage_seconds_count"
        assert value(telemetry, count, stage=stage, model="colours") == 1
