"""Messages and the domain have the same fields; the best of very many classes are found."""

from typing import Any, get_args, get_type_hints

import msgspec
import numpy as np
import pytest
from google.protobuf.message import Message
from graftml_stubs.v1 import fine_tuning_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

from service.contract import (
    Augmentation,
    DomainAdaptation,
    FeatureBased,
    Gate,
    Grouping,
    ModelBased,
)
from service.errors import InvalidInput
from service.jobs.request import JobRequest
from service.rpc.codec import requests
from service.rpc.codec.predictions import best

IMAGES = {"target_path", "target_dataset_id", "target_images"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FeatureBased, pb.FeatureBased),
        (ModelBased, pb.ModelBased),
        (DomainAdaptation, pb.DomainAdaptation),
        (Augmentation, pb.Augmentation),
        (Grouping, pb.Grouping),
        (Gate, pb.Gate),
    ],
)
def test_a_struct_has_a_field_for_each_of_its_message(
    kind: type[msgspec.Struct], message: Any
) -> None:
    fields = {
        "max_latency_ms" if name == "max_latency" else name
        for name in message.DESCRIPTOR.fields_by_name
    }
    assert set(kind.__struct_fields__) == fields - IMAGES


def _words(kind: type[msgspec.Struct], name: str) -> set[str]:
    """Collects the strings of a Literal, also within a list."""
    hint = get_type_hints(kind)[name]
    return set(get_args(get_args(hint)[0] if get_args(get_args(hint)[0]) else hint))


@pytest.mark.parametrize(
    ("kind", "message", "name"),
    [
        (ModelBased, pb.ModelBased, "recipe"),
        (ModelBased, pb.ModelBased, "precision"),
        (DomainAdaptation, pb.DomainAdaptation, "technique"),
        (Gate, pb.Gate, "when_uncertain"),
        (JobRequest, pb.FineTuneRequest, "device"),
        (JobRequest, pb.FineTuneRequest, "framing"),
        (JobRequest, pb.FineTuneRequest, "serving_precision"),
        (JobRequest, pb.FineTuneRequest, "baselines"),
    ],
)
def test_a_struct_has_a_word_for_each_value_of_an_enumeration(
    kind: type[msgspec.Struct], message: Any, name: str
) -> None:
    enum = message.DESCRIPTOR.fields_by_name[name].enum_type
    words = {requests._named(enum, number, name) for number in enum.values_by_number if number}
    assert words == _words(kind, name) - ({"auto"} - words)


def test_numbers_without_a_name_are_refused_by_field() -> None:
    wrong: dict[str, Message] = {
        "device": pb.FineTuneRequest(device=99),  # type: ignore[arg-type]
        "baselines": pb.FineTuneRequest(baselines=[0]),  # type: ignore[list-item]
        "model_based.recipe": pb.FineTuneRequest(model_based=pb.ModelBased(recipe=9)),  # type: ignore[arg-type]
        "gate.when_uncertain": pb.FineTuneRequest(gate=pb.Gate(when_uncertain=9)),  # type: ignore[arg-type]
    }
    for field, message in wrong.items():
        with pytest.raises(InvalidInput) as caught:
            requests.job(message, "cats")  # type: ignore[arg-type]
        assert caught.value.field == field
        assert "is none: use a value of" in caught.value.message


def test_a_request_that_is_too_large_without_its_images_is_refused() -> None:
    image = pb.InlineImages()
    image.images.add(content=bytes(8 * 2**20))
    requests.check_size(pb.FineTuneRequest(inline_images=image))
    with pytest.raises(InvalidInput, match="4 MiB"):
        requests.check_size(pb.FineTuneRequest(inline_images=image, backbone="b" * 5 * 2**20))


@given(
    st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, float("nan")]), min_size=1, max_size=12),
    st.integers(1, 14),
)
def test_the_best_are_those_of_a_stable_sort(values: list[float], k: int) -> None:
    probabilities = np.array(values, np.float32)
    expected = np.argsort(-probabilities, kind="stable")[:k]
    assert best(probabilities, k).tolist() == expected.tolist()
