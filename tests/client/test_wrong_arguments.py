"""Arguments of the wrong kind are named, with what they must be."""

import dataclasses
from pathlib import Path
from typing import Any

import graftml
import numpy as np
import pytest
from graftml import _encoding, types
from graftml.testing import FakeGraft
from PIL import Image

PIXELS = np.zeros((2, 2, 3), np.uint8)
GIVE = r'give a label \(text\) and an image, as \("ants", "a.jpg"\)'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(0, "a.jpg")], r"tuple of an int and a str: labels are text: give str\(0\)"),
        ([(np.int64(1), PIXELS)], r"labels are text: give str\(1\)"),
        ([(Path("a.jpg"), "ants")], f"and a str: the label comes first: {GIVE}"),
        ([(PIXELS, "ants")], f"tuple of a ndarray and a str: the label comes first: {GIVE}"),
        ([(None, "a.jpg")], f"tuple of a NoneType and a str: {GIVE}"),
        ([("ants", "a.jpg", 3)], f"a str, a str, an int: {GIVE}, and the name of its group"),
        ([("ants", "a.jpg", "b", "c")], f"a tuple of 4: {GIVE}, and the name of its group, if any"),
        ([Path("a.jpg")], f"no pair: {GIVE}"),
        ([Image.new("RGB", (2, 2))], f"an Image, no pair: {GIVE}"),
        ([None], f"a NoneType, no pair: {GIVE}"),
    ],
)
def test_what_is_no_pair_is_told_with_what_is_wanted(client: Any, data: Any, message: str) -> None:
    with pytest.raises(graftml.InvalidArgument, match=rf"data\[0\] is .*{message}") as caught:
        client.upload_dataset(data)
    assert caught.value.violations[0].field == "data[0]"
    if isinstance(data[0], tuple):
        with pytest.raises(graftml.InvalidArgument, match=message):
            client.upload_dataset(data, is_unlabelled=True)


def test_a_dict_is_refused_with_the_pairs_of_it(client: Any) -> None:
    data: Any = {"ants": ["a.jpg"]}
    with pytest.raises(
        graftml.InvalidArgument, match=r"\[\(label, image\) for label, images in d\.it"
    ):
        client.fine_tune(data, "pets")
    with pytest.raises(graftml.InvalidArgument, match=r"\[image for images in d\.values\(\) for"):
        client.upload_dataset(data, is_unlabelled=True)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("pets@prod", "model is 'pets@prod': give model='pets' and alias='prod'"),
        ("pets:3", "model is 'pets:3': give model='pets' and version=3"),
    ],
)
def test_a_model_with_a_version_in_its_name_is_refused(
    client: Any, server: FakeGraft, model: str, message: str
) -> None:
    for ask in (
        lambda: client.predict(PIXELS, model),
        lambda: list(client.predict_stream([PIXELS], model)),
        lambda: client.get_version(model),
        lambda: client.get_report(model),
        lambda: client.export_model(model, "unused.onnx"),
    ):
        with pytest.raises(graftml.InvalidArgument) as caught:
            ask()
        assert caught.value.message == message
    # A stream may be open by then, with nothing in it.
    assert {call.method for call in server.calls} <= {"PredictStream"}
    assert not any(call.request for call in server.calls)


def test_a_name_that_only_looks_so_is_left_to_the_server(client: Any, server: FakeGraft) -> None:
    for name in ("pets:x", "@prod", ":3", "pets@"):
        with pytest.raises(graftml.GraftError):
            client.predict(PIXELS, name)
    assert len(server.calls) == 4


@pytest.mark.parametrize(
    ("ask", "name", "wanted"),
    [
        (lambda c: c.predict(PIXELS, "pets", version="1"), "version", "a whole number"),
        (lambda c: c.predict(PIXELS, "pets", version=1.5), "version", "a whole number"),
        (lambda c: c.predict(PIXELS, "pets", alias=3), "alias", "text"),
        (lambda c: c.predict(PIXELS, 3), "model", "text"),
        (lambda c: c.predict(PIXELS, "pets", top_k="2"), "top_k", "a whole number"),
        (lambda c: c.predict(PIXELS, "pets", top_k=True), "top_k", "a whole number"),
        (lambda c: c.get_version("pets", version="1"), "version", "a whole number"),
        (lambda c: c.set_alias("pets", "prod", "1"), "version", "a whole number"),
        (lambda c: c.delete_model("pets", force="yes"), "force", "True or False"),
        (lambda c: c.get_job(3), "job_id", "text"),
        (lambda c: list(c.watch_job(3)), "job_id", "text"),
        (lambda c: list(c.watch_job("job-1", after="2")), "after", "a whole number"),
        (lambda c: list(c.list_jobs(states=3)), "states", "a list, each text, or text"),
        (lambda c: c.rank_backbones("ds-1", backbones=3), "backbones", "a list of names"),
        (lambda c: c.rank_backbones("ds-1", backbones=[3]), "backbones", "a list, each text"),
        (
            lambda c: c.rank_backbones("ds-1", time_budget_s="60"),
            "time_budget_s",
            "a number",
        ),
        (
            lambda c: c.upload_dataset([("a", PIXELS)], is_unlabelled="no"),
            "is_unlabelled",
            "True or False",
        ),
        (lambda c: c.upload_dataset([("a", PIXELS)], display_name=3), "display_name", "text"),
        (lambda c: c.fine_tune("ds-1", 3), "name", "text"),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(
    client: Any, server: FakeGraft, ask: Any, name: str, wanted: str
) -> None:
    with pytest.raises(
        graftml.InvalidArgument, match=f"^{name} is .*: it must be {wanted}"
    ) as caught:
        ask(client)
    assert caught.value.violations[0].field == name
    assert not server.calls


@pytest.mark.parametrize(
    ("options", "name", "wanted"),
    [
        ({"seed": "1"}, "seed", "a whole number"),
        ({"labels": {"a": 1}}, "labels", "a dict of text to text"),
        ({"labels": ["a"]}, "labels", "a dict of text to text"),
        ({"background": (0, 0, 0)}, "background", "text"),
        ({"backbone": 3}, "backbone", "text"),
        ({"validation_fraction": "a fifth"}, "validation_fraction", "a number"),
        ({"time_budget_s": "60"}, "time_budget_s", "a number"),
        ({"outlier_false_alarm_rate": "few"}, "outlier_false_alarm_rate", "a number"),
        ({"case_sensitive_labels": "no"}, "case_sensitive_labels", "True or False"),
        ({"gate": {"min_accuracy": 0.9}}, "gate", "a Gate"),
        ({"gate": graftml.Gate(min_accuracy="0.9")}, "gate.min_accuracy", "a number"),  # type: ignore[arg-type]
        ({"gate": graftml.Gate(max_latency_ms="9")}, "gate.max_latency_ms", "a number"),  # type: ignore[arg-type]
        ({"augmentation": {"mirror": False}}, "augmentation", "an Augmentation"),
        (
            {"augmentation": graftml.Augmentation(min_scale="half")},  # type: ignore[arg-type]
            "augmentation.min_scale",
            "a number",
        ),
        ({"base": 1.5}, "base", "a BaseVersion, or a whole number, or text"),
        ({"base": graftml.BaseVersion(version="1")}, "base.version", "a whole number"),  # type: ignore[arg-type]
        ({"baselines": 3}, "baselines", "a list, each one of linear_probe"),
        ({"device": ["cpu"]}, "device", "one of auto, cpu, cuda"),
        ({"method": "model_based", "epochs": "3"}, "epochs", "a whole number"),
        ({"method": graftml.FeatureBased(l2="1")}, "method.l2", "a number"),  # type: ignore[arg-type]
        ({"method": {"l2": 1.0}}, "method", "one of auto, feature_based, model_based"),
        ({"grouping": 1.5}, "grouping", "a Grouping, or a whole number, or text"),
        ({"gate": graftml.Gate(class_recalls={"ants": "0.9"})}, "gate.class_recalls", "a dict"),  # type: ignore[dict-item]
    ],
)
def test_an_option_of_the_wrong_type_is_named(
    client: Any, server: FakeGraft, options: Any, name: str, wanted: str
) -> None:
    with pytest.raises(graftml.InvalidArgument) as caught:
        client.fine_tune("ds-1", "pets", **options)
    assert caught.value.message.startswith(f"{name} is ")
    assert f": it must be {wanted}" in caught.value.message
    assert caught.value.violations[0].field == name
    assert not server.calls


@pytest.mark.parametrize("budget", [float("nan"), 1e300])
def test_a_time_that_is_none_is_named(client: Any, budget: float) -> None:
    with pytest.raises(graftml.InvalidArgument, match=r"^time_budget_s cannot be sent"):
        client.fine_tune("ds-1", "pets", time_budget_s=budget)


def test_numbers_of_numpy_are_numbers(client: Any, server: FakeGraft) -> None:
    server.add_model("pets")
    [answer] = client.predict(PIXELS, "pets", version=np.int64(1), top_k=np.int32(1))
    assert answer.version == 1
    with pytest.raises(graftml.InvalidArgument, match=r"^alias is 3"):
        client.get_version("pets", alias=3, version=None)


def test_every_option_has_a_hint_that_can_be_described() -> None:
    hints = types.FineTuneOptions.__annotations__
    for kind in (types.Gate, types.BaseVersion, types.ModelBased, types.DomainAdaptation):
        assert dataclasses.is_dataclass(kind)
        hints = {**hints, **kind.__annotations__}
    assert "target" in hints
    assert all(_encoding._described(hint) for name, hint in hints.items() if name != "target")
