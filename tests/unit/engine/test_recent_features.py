"""Features of recent images: when nothing is computed again, what leaves, and whose they are."""

import dataclasses
import threading

import numpy as np
import pytest

from service.domain import DEFAULT_DECODING, ImageDecoding
from service.engine.engine import AskedModel, Classified, Engine, ModelFiles, Outcome
from service.engine.head import Floats
from service.engine.preprocess import Encoded, Tensor
from service.engine.recent_features import Known, RecentFeatures
from service.errors import GraftError
from service.ops.metrics import Metrics
from tests.fake_runtime import FakeRuntime
from tests.keys import key
from tests.unit.engine.conftest import GUARD_S, MakeEngine, MakeModel, image
from tests.unit.engine.test_engine import best, value

MIB = 2**20
FEATURES = np.arange(100, dtype=np.float32)
"""400 bytes, and as many beside them."""


def known(image: bytes = b"1", decoding: ImageDecoding = DEFAULT_DECODING) -> Known:
    return Known(image, decoding, "backbone")


def kept(metrics: Metrics) -> float:
    return value(metrics, "graft_recent_features_bytes")


def lookups(metrics: Metrics) -> tuple[float, float]:
    name = "graft_recent_features_total"
    return value(metrics, name, outcome="hit"), value(metrics, name, outcome="miss")


def test_what_was_used_longest_ago_leaves_first(metrics: Metrics) -> None:
    recent = RecentFeatures(3 * 800, metrics)
    for name in (b"1", b"2", b"3"):
        recent.put("acme", known(name), FEATURES)
    assert recent.get("acme", known(b"1")) is FEATURES
    recent.put("acme", known(b"4"), FEATURES)
    assert [recent.get("acme", known(name)) is not None for name in (b"1", b"2", b"3", b"4")] == [
        True, False, True, True,
    ]  # fmt: skip
    assert kept(metrics) == 3 * 800
    assert lookups(metrics) == (4, 1)


def test_a_tenant_that_sends_much_pushes_out_its_own_alone(metrics: Metrics) -> None:
    recent = RecentFeatures(4 * 800, metrics)
    recent.put("zoo", known(), FEATURES)
    for number in range(20):
        recent.put("acme", known(bytes([number])), FEATURES)
    assert recent.get("zoo", known()) is not None


def test_no_tenant_finds_anothers(metrics: Metrics) -> None:
    recent = RecentFeatures(MIB, metrics)
    recent.put("acme", known(), FEATURES)
    assert recent.get("zoo", known()) is None


def test_features_are_of_a_decoding_and_a_backbone(metrics: Metrics) -> None:
    recent = RecentFeatures(MIB, metrics)
    recent.put("acme", known(), FEATURES)
    assert recent.get("acme", known(decoding=ImageDecoding(framing="whole"))) is None
    assert recent.get("acme", known()._replace(backbone="another")) is None


def test_of_an_erased_image_nothing_is_kept_and_of_an_unknown_one_nothing_of_any(
    metrics: Metrics,
) -> None:
    recent = RecentFeatures(MIB, metrics)
    for name in (b"\x01", b"\x02"):
        for decoding in (DEFAULT_DECODING, ImageDecoding(framing="whole")):
            recent.put("acme", known(name, decoding), FEATURES)
    recent.put("zoo", known(b"\x01"), FEATURES)
    recent.forget("acme", "01")
    recent.forget("nobody", "01")
    assert recent.get("acme", known(b"\x01")) is None
    assert recent.get("acme", known(b"\x02")) is not None
    assert recent.get("zoo", known(b"\x01")) is not None
    assert kept(metrics) == 3 * 800
    recent.forget("", "")
    assert recent.get("zoo", known(b"\x01")) is None
    assert kept(metrics) == 0


def test_an_image_that_is_kept_again_counts_once(metrics: Metrics) -> None:
    recent = RecentFeatures(MIB, metrics)
    for _ in range(3):
        recent.put("acme", known(), FEATURES)
    assert kept(metrics) == 800


def test_threads_that_keep_and_look_up_at_once_stay_within_the_bound(metrics: Metrics) -> None:
    recent = RecentFeatures(50 * 800, metrics)
    wrong: list[Floats] = []

    def work(own: int) -> None:
        for number in range(500):
            name = bytes([number % 97])
            recent.put("acme" if own % 2 else "zoo", known(name), FEATURES)
            found = recent.get("zoo", known(name))
            if found is not None and found is not FEATURES:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    assert wrong == []
    assert 0 < kept(metrics) <= 50 * 800


# In the engine


async def ask(engine: Engine, model: ModelFiles, sent: bytes | Tensor) -> Outcome:
    images = [sent if isinstance(sent, Tensor) else Encoded(lambda: sent)]
    ((outcome,),) = await engine.classify_with(
        [AskedModel(model)], images, GUARD_S, finish=list
    )  # fmt: skip
    return outcome


def features_of(outcome: Outcome) -> bytes:
    assert isinstance(outcome, Classified)
    return outcome.features.tobytes() + outcome.probabilities.tobytes()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each image that is opened or decoded."""
    noted: list[str] = []
    for kind in (Encoded, Tensor):
        decode = kind.__call__

        def note(self: Encoded, decoding: ImageDecoding, decode: object = decode) -> object:
            noted.append(decoding.framing)
            return decode(self, decoding)  # type: ignore[operator]

        monkeypatch.setattr(kind, "__call__", note)
    return noted


async def test_an_image_that_comes_again_is_not_decoded_and_gets_the_same_answer(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, metrics: Metrics,
    decoded: list[str],
) -> None:  # fmt: skip
    engine, model = make_engine(recent_bytes=MIB), make_model()
    plain = features_of(await ask(make_engine(), model, image("red")))
    decoded.clear()
    answers = [features_of(await ask(engine, model, image("red"))) for _ in range(3)]
    assert answers == [plain] * 3
    assert decoded == ["crop"]
    assert runtime.session(model.backbone_digest).batches == [1, 1]
    assert lookups(metrics) == (2, 1)
    count = "graft_predict_stage_seconds_count"
    assert value(metrics, count, stage="queue", model="colours") == 4
    # What was not done took no time.
    assert value(metrics, count, stage="decode", model="colours") == 2
    assert value(metrics, count, stage="infer", model="colours") == 2


async def test_another_model_on_the_backbone_finds_what_the_first_one_left(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, decoded: list[str]
) -> None:
    engine, model = make_engine(recent_bytes=MIB), make_model("a")
    await ask(engine, model, image("red"))
    assert best(await ask(engine, make_model("b", classes=("x", "y", "z")), image("red"))) == "x"
    assert len(decoded) == 1
    # On another backbone it is computed, and so is another framing of it.
    await ask(engine, make_model("c", "b1"), image("red"))
    whole = dataclasses.replace(model, decoding=ImageDecoding(framing="whole"))
    await ask(engine, whole, image("red"))
    assert decoded == ["crop", "crop", "whole"]


async def test_of_several_backbones_only_those_run_that_have_not_seen_the_image(
    make_engine: MakeEngine, make_model: MakeModel, runtime: FakeRuntime, decoded: list[str]
) -> None:
    engine = make_engine(recent_bytes=MIB)
    models = [make_model("a", "b0"), make_model("b", "b1")]
    await ask(engine, models[0], image("red"))
    both = [AskedModel(files) for files in models]
    for _ in range(2):
        sent = [Encoded(lambda: image("red"))]
        ((first,), (second,)) = await engine.classify_with(both, sent, GUARD_S, finish=list)
        assert best(first) == best(second) == "red"
    assert [runtime.session(each.backbone_digest).batches for each in models] == [[1], [1]]
    assert len(decoded) == 2


async def test_tenants_share_no_features(
    make_engine: MakeEngine, make_model: MakeModel, decoded: list[str]
) -> None:
    engine, model = make_engine(recent_bytes=MIB), make_model()
    for tenant in ("acme", "zoo"):
        await ask(engine, dataclasses.replace(model, model=key("m", tenant)), image("red"))
    assert len(decoded) == 2


async def test_without_a_bound_nothing_is_kept(
    make_engine: MakeEngine, make_model: MakeModel, metrics: Metrics, decoded: list[str]
) -> None:
    engine, model = make_engine(recent_bytes=0), make_model()
    for _ in range(2):
        await ask(engine, model, image("red"))
    assert len(decoded) == 2
    assert (lookups(metrics), kept(metrics)) == ((0, 0), 0)


async def test_an_image_that_cannot_be_decoded_is_refused_each_time(
    make_engine: MakeEngine, make_model: MakeModel, metrics: Metrics, decoded: list[str]
) -> None:
    engine, model = make_engine(recent_bytes=MIB), make_model()
    for _ in range(2):
        assert isinstance(await ask(engine, model, b"no image"), GraftError)
    assert len(decoded) == 2
    assert kept(metrics) == 0


async def test_numbers_are_known_by_their_shape_and_type_too(
    make_engine: MakeEngine, make_model: MakeModel, decoded: list[str]
) -> None:
    engine, model = make_engine(recent_bytes=MIB), make_model()
    data = bytes([255, 0, 0, 0, 0, 255] * 8)
    for shape, is_float in (([4, 4, 3], False), ([2, 8, 3], False), ([2, 2, 3], True)):
        for _ in range(2):
            await ask(engine, model, Tensor(lambda: data, shape, is_float=is_float))
    # The floats are not an image, and are looked at again.
    assert len(decoded) == 4


async def test_whoever_gets_features_cannot_change_those_that_are_kept(
    make_engine: MakeEngine, make_model: MakeModel
) -> None:
    engine, model = make_engine(recent_bytes=MIB), make_model()
    outcome = await ask(engine, model, image("red"))
    assert isinstance(outcome, Classified)
    with pytest.raises(ValueError, match="read-only"):
        outcome.features[0] = 7
