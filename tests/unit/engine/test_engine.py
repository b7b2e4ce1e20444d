import asyncio
import dataclasses
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import generate_latest

from service.engine import preprocess
from service.engine.engine import AskedModel, Classified, Decode, ModelFiles
from service.engine.head import Head
from service.engine.outliers import Outliers
from service.errors import Damaged, Exhausted, Expired, GraftError, InvalidInput, Reason
from service.ops.metrics import Metrics
from tests.fake_runtime import FakeRuntime
from tests.keys import key
from tests.unit.engine.conftest import COLOURS, GUARD_S, MakeEngine, MakeModel, Stored, image


def encoded(colour: str) -> Decode:
    return partial(preprocess.decode, image(colour))


def best(outcome: Classified | GraftError) -> str:
    assert isinstance(outcome, Classified)
    return outcome.classes[int(outcome.probabilities.argmax())]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    return 0.0 if found is None else found


async def wait_until_running(runtime: FakeRuntime, digest: str) -> None:
    session = runtime.session(digest)
    assert await asyncio.to_thread(session.running.acquire, timeout=GUARD_S)


async def until_waiting(metrics: Metrics, images: int) -> None:
    while value(metrics, "graft_queue_depth") < images:  # noqa: ASYNC110 - a few turns
        await asyncio.sleep(0)


async def test_each_image_gets_the_class_of_its_own_colour(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    outcomes = await make_engine().classify(
        make_model(), [encoded(c) for c in ("blue", "red", "lime")], GUARD_S
    )
    assert [best(o) for o in outcomes] == ["blue", "red", "green"]
    assert all(
        isinstance(o, Classified) and abs(o.probabilities.sum() - 1) < 1e-5 for o in outcomes
    )


async def test_what_a_caller_gets_is_made_in_a_workers_thread(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine, model = make_engine(), make_model()

    def finish(outcomes: list[list[Classified | GraftError]]) -> tuple[str, list[str]]:
        return threading.current_thread().name, [best(outcome) for outcome in outcomes[0]]

    made = await engine.classify_with(
        [AskedModel(model)], [encoded(c) for c in ("blue", "red")], GUARD_S, finish=finish
    )
    assert made == ("infer-0", ["blue", "red"])

    def refuse(_: object) -> None:
        raise InvalidInput(Reason.INVALID_FIELD, "too many scores")

    with pytest.raises(InvalidInput, match="too many scores"):
        await engine.classify_with([AskedModel(model)], [encoded("red")], GUARD_S, finish=refuse)


async def test_a_bad_image_fails_alone(make_engine: MakeEngine, make_model: MakeModel) -> None:
    bad = partial(preprocess.decode, b"no image")
    good, failed = await make_engine().classify(make_model(), [encoded("red"), bad], GUARD_S)
    assert best(good) == "red"
    assert isinstance(failed, GraftError)
    assert failed.reason is Reason.IMAGE_UNREADABLE


async def test_arrivals_for_different_models_while_busy_form_one_batch(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, metrics: Metrics
) -> None:
    engine = make_engine()
    models = [make_model(f"m{i}") for i in range(5)]
    session = runtime.session(models[0].backbone_digest)
    session.hold()
    first = asyncio.create_task(engine.classify(models[0], [encoded("red")], GUARD_S))
    await wait_until_running(runtime, models[0].backbone_digest)
    others = [
        asyncio.create_task(engine.classify(m, [encoded("blue")], GUARD_S)) for m in models[1:]
    ]
    await until_waiting(metrics, 4)
    session.release()
    assert best((await first)[0]) == "red"
    assert [best((await o)[0]) for o in others] == ["blue"] * 4
    assert session.batches == [1, 4]
    assert len(runtime.loads) == 1


async def test_a_batch_never_passes_its_bound(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    model = make_model()
    await make_engine(max_batch=3).classify(model, [encoded("red")] * 10, GUARD_S)
    assert max(runtime.session(model.backbone_digest).batches) <= 3
    assert sum(runtime.session(model.backbone_digest).batches) == 10


async def test_more_images_than_the_queue_holds_are_refused_with_a_retry_time(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, metrics: Metrics
) -> None:
    engine, model = make_engine(max_queue=2), make_model()
    session = runtime.session(model.backbone_digest)
    session.hold()
    running = asyncio.create_task(engine.classify(model, [encoded("red")], GUARD_S))
    await wait_until_running(runtime, model.backbone_digest)
    accepted = asyncio.create_task(engine.classify(model, [encoded("red")] * 2, GUARD_S))
    await until_waiting(metrics, 2)
    with pytest.raises(Exhausted) as refused:
        await engine.classify(model, [encoded("red")], GUARD_S)
    assert refused.value.reason is Reason.QUEUE_FULL
    assert refused.value.retry_after_s
    session.release()
    assert [best(o) for o in [*await running, *await accepted]] == ["red"] * 3
    assert [best(o) for o in await engine.classify(model, [encoded("blue")], GUARD_S)] == ["blue"]


async def test_a_flood_for_one_model_delays_another_by_an_image(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, metrics: Metrics
) -> None:
    engine = make_engine(max_batch=2)
    flooding, other = make_model("flooding"), make_model("other")
    session = runtime.session(flooding.backbone_digest)
    session.hold()
    floods = [asyncio.create_task(engine.classify(flooding, [encoded("red")], GUARD_S))]
    await wait_until_running(runtime, flooding.backbone_digest)
    floods += [
        asyncio.create_task(engine.classify(flooding, [encoded("red")], GUARD_S)) for _ in range(19)
    ]
    await until_waiting(metrics, 19)
    late = asyncio.create_task(engine.classify(other, [encoded("blue")], GUARD_S))
    await until_waiting(metrics, 20)
    ended: list[str] = []
    for task in floods:
        task.add_done_callback(lambda _: ended.append("flooding"))
    late.add_done_callback(lambda _: ended.append("other"))
    session.release()
    await asyncio.gather(late, *floods)
    # After the one that ran and the one that shares its batch.
    assert ended.index("other") <= 2


async def test_a_full_queue_makes_room_for_a_model_with_less_than_its_share(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, metrics: Metrics
) -> None:
    engine = make_engine(max_queue=4)
    flooding, other = make_model("flooding"), make_model("other")
    session = runtime.session(flooding.backbone_digest)
    session.hold()
    floods = [asyncio.create_task(engine.classify(flooding, [encoded("red")], GUARD_S))]
    await wait_until_running(runtime, flooding.backbone_digest)
    for waiting in range(1, 5):
        floods.append(asyncio.create_task(engine.classify(flooding, [encoded("red")], GUARD_S)))
        await until_waiting(metrics, waiting)
    late = asyncio.create_task(engine.classify(other, [encoded("blue")], GUARD_S))
    with pytest.raises(Exhausted):
        await floods[-1]
    session.release()
    assert best((await late)[0]) == "blue"
    assert [best(o) for task in floods[:-1] for o in await task] == ["red"] * 4


async def test_a_call_that_made_room_in_vain_is_told_at_once(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, metrics: Metrics
) -> None:
    engine = make_engine(max_queue=10)
    flooding, small, large = make_model("flooding"), make_model("small"), make_model("large")
    session = runtime.session(flooding.backbone_digest)
    session.hold()
    calls = [asyncio.create_task(engine.classify(flooding, [encoded("red")], GUARD_S))]
    await wait_until_running(runtime, flooding.backbone_digest)
    for model, count, waiting in ((flooding, 4, 4), (flooding, 3, 7), (small, 3, 10)):
        calls.append(asyncio.create_task(engine.classify(model, [encoded("red")] * count, GUARD_S)))
        await until_waiting(metrics, waiting)
    # Seven are more than five, and make room for three of them; the other four are not more.
    with pytest.raises(Exhausted):
        await engine.classify(large, [encoded("red")] * 5, GUARD_S)
    with pytest.raises(Exhausted):
        async with asyncio.timeout(GUARD_S):
            await calls.pop(2)
    session.release()
    await asyncio.gather(*calls)


async def test_what_could_not_be_done_in_time_is_refused_at_once(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, metrics: Metrics
) -> None:
    engine, model = make_engine(), make_model()
    session = runtime.session(model.backbone_digest)
    session.infer_s = 1.0
    session.hold()
    running = asyncio.create_task(engine.classify(model, [encoded("red")], GUARD_S))
    await wait_until_running(runtime, model.backbone_digest)
    waiting = asyncio.create_task(engine.classify(model, [encoded("red")] * 4, 600))
    await until_waiting(metrics, 4)
    with pytest.raises(Exhausted, match="later than their deadline"):
        await engine.classify(model, [encoded("red")], 5)
    session.release()
    await asyncio.gather(running, waiting)


async def test_a_lone_image_gets_all_cores_and_many_share_them(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine, model = make_engine(threads=4), make_model()
    session = runtime.session(model.backbone_digest)
    await engine.classify(model, [encoded("red")], GUARD_S)
    assert session.cores == [4]
    session.cores.clear()
    session.hold()
    many = asyncio.create_task(engine.classify(model, [encoded("red")] * 64, GUARD_S))
    for _ in range(4):
        await wait_until_running(runtime, model.backbone_digest)
    session.release()
    await many
    assert min(session.cores) == 1
    assert max(session.batches) <= 16, "one worker took more than its share"


async def test_statistics_count_what_each_version_was_asked(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine, model = make_engine(), make_model()
    await engine.classify(model, [encoded("red"), partial(preprocess.decode, b"")], GUARD_S)
    gone = dataclasses.replace(model, head_digest="0" * 64)
    with pytest.raises(Damaged):
        await engine.classify(gone, [encoded("red")], GUARD_S)
    counts = engine.ledger.of(model.model, model.version)
    assert (counts.images, counts.success.count, counts.fail.count) == (2, 1, 1)


async def test_a_call_that_outlives_its_model_is_answered_and_leaves_no_trace(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, metrics: Metrics
) -> None:
    engine, model = make_engine(), make_model()
    session = runtime.session(model.backbone_digest)
    session.hold()
    call = asyncio.create_task(engine.classify(model, [encoded("red")], GUARD_S))
    await wait_until_running(runtime, model.backbone_digest)
    engine.ledger.keep_only(model.model, [], engine.ledger.recorded(model.model))
    session.release()
    (outcome,) = await call
    assert best(outcome) == "red"
    assert not engine.ledger.all()
    assert model.model.name not in generate_latest(metrics.registry).decode()


async def test_a_call_ends_at_its_deadline_and_its_images_leave_the_queue(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine, model = make_engine(), make_model()
    session = runtime.session(model.backbone_digest)
    session.hold()
    busy = asyncio.create_task(engine.classify(model, [encoded("red")], GUARD_S))
    await wait_until_running(runtime, model.backbone_digest)
    with pytest.raises(Expired):
        await engine.classify(model, [encoded("blue")] * 3, 0.05)
    session.release()
    await busy
    await engine.classify(model, [encoded("red")], GUARD_S)
    assert sum(session.batches) == 2, "the expired images were run"


async def test_a_cancelled_call_does_not_hurt_the_others_of_its_batch(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine, model = make_engine(), make_model()
    session = runtime.session(model.backbone_digest)
    session.hold()
    leaving = asyncio.create_task(engine.classify(model, [encoded("red")], GUARD_S))
    await wait_until_running(runtime, model.backbone_digest)
    staying = asyncio.create_task(engine.classify(model, [encoded("blue")], GUARD_S))
    leaving.cancel()
    session.release()
    assert best((await staying)[0]) == "blue"
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_a_failed_run_fails_its_batch_and_not_the_next_one(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    engine, model = make_engine(), make_model()
    runtime.session(model.backbone_digest).fail_next = RuntimeError("kernel")
    with pytest.raises(RuntimeError, match="kernel"):
        await engine.classify(model, [encoded("red")], GUARD_S)
    assert best((await engine.classify(model, [encoded("red")], GUARD_S))[0]) == "red"


async def test_a_missing_backbone_is_a_damaged_model_and_may_be_tried_again(
    make_engine: MakeEngine, make_model: MakeModel, stored: Stored
) -> None:
    engine, model = make_engine(), make_model()
    whole = stored.pop(model.backbone_digest)
    with pytest.raises(Damaged):
        await engine.classify(model, [encoded("red")], GUARD_S)
    stored.add(whole)
    assert best((await engine.classify(model, [encoded("red")], GUARD_S))[0]) == "red"


async def test_a_head_that_does_not_fit_its_backbone_is_refused(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime
) -> None:
    model = make_model()
    runtime.session(model.backbone_digest).feature_dim = 2
    with pytest.raises(Damaged):
        await make_engine().warm(model)


async def test_features_are_the_backbones_own(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    (outcome,) = await make_engine().classify(make_model(), [encoded("blue")], GUARD_S)
    assert isinstance(outcome, Classified)
    np.testing.assert_allclose(outcome.features, [0, 0, 1], atol=1e-6)


async def test_every_stage_of_an_image_is_measured(
    make_engine: MakeEngine, make_model: MakeModel, metrics: Metrics
) -> None:
    await make_engine().classify(make_model(), [encoded("red")], GUARD_S)
    for stage in ("decode", "queue", "infer", "total"):
        count = "graft_predict_stage_seconds_count"
        assert value(metrics, count, stage=stage, model="colours") == 1


async def test_an_image_is_scored_by_its_features_and_by_what_the_head_says_of_it(
    make_engine: MakeEngine, make_model: MakeModel, stored: Stored, tmp_path: Path
) -> None:
    model = make_model()
    outliers = Outliers(
        np.eye(3, dtype=np.float16),
        np.ones(3, np.float32),
        np.zeros(0, np.float16),
        energy_weight=0.2,
        energy_floor=-100.0,
        offset=1.5,
    )
    weight = np.eye(3, dtype=np.float32)
    head = Head(weight, np.zeros(3, np.float32), COLOURS, 0.5, outliers)
    model = dataclasses.replace(model, head_digest=stored.add_head(head, tmp_path))
    outcomes = await make_engine().classify(
        model, [encoded(colour) for colour in ("blue", "red")], GUARD_S
    )
    for outcome in outcomes:
        assert isinstance(outcome, Classified)
        said = np.log(outcome.probabilities)[None]
        (expected,) = outliers.distances(outcome.features[None]) + 0.2 * said.mean() + 1.5
        assert outcome.outlier_score == pytest.approx(expected, rel=1e-5)
        assert expected > 0


async def test_the_validation_scores_shown_are_those_of_the_version_that_answers(
    make_engine: MakeEngine,
    make_model: MakeModel,
    metrics: Metrics,
    stored: Stored,
    tmp_path: Path,
) -> None:
    engine = make_engine()

    def model(file: str, version: int, scores: list[float]) -> ModelFiles:
        made = make_model(file)
        outliers = Outliers(
            np.eye(3, dtype=np.float16), np.ones(3, np.float32), np.array(scores, np.float16)
        )
        weight = np.eye(3, dtype=np.float32)
        head = Head(weight, np.zeros(3, np.float32), COLOURS, outliers=outliers)
        digest = stored.add_head(head, tmp_path)
        return dataclasses.replace(made, model=key("colours"), version=version, head_digest=digest)

    def shown() -> tuple[float, float]:
        labels = {"model": "colours", "origin": "validation"}
        name = "graft_outlier_score"
        return (
            value(metrics, f"{name}_count", **labels),
            round(value(metrics, f"{name}_sum", **labels), 2),
        )

    serves, candidate = model("serves", 1, [0.5, 0.75]), model("candidate", 2, [2.0])
    await engine.warm(serves)
    assert shown() == (0, 0)
    await engine.classify(serves, [encoded("red")], GUARD_S)
    assert shown() == (2, 1.25)
    await engine.warm(candidate)
    await engine.classify(serves, [encoded("red")], GUARD_S)
    assert shown() == (2, 1.25)
    # What is in memory already counts too.
    await engine.classify(candidate, [encoded("red")], GUARD_S)
    assert shown() == (1, 2.0)
    await engine.classify(serves, [encoded("red")], GUARD_S)
    assert shown() == (2, 1.25)
