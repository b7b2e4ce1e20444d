"""The measurement of serving: what its ratios divide, and what the load sends."""

import itertools
from typing import Any

import numpy as np
from graftml_stubs.v1 import prediction_pb2

from bench.photographs import photos, write
from bench.serve import load, table
from bench.serve.table import DEFAULTS, PLAIN, Backbone, Cell
from service.engine import preprocess

# Rounds on a machine that gets slower: what divides across rounds says 0.2, 1 or 5.
RATES = {
    PLAIN: (100.0, 50.0, 20.0),
    DEFAULTS: (98.0, 51.0, 20.2),
    "cpu": (103.0, 51.0, 21.0),
    "openvino": (200.0, 30.0, 10.0),
}


def found(rates: dict[str, tuple[float, ...]]) -> Backbone:
    backbone = Backbone("network", chosen={"fp32": "cpu"})
    for name, values in rates.items():
        runs: list[dict[str, Any]] = [
            {"per_second": value, "p50_ms": 1000 / value, "cpu_ms": 2000 / value}
            for value in values
        ]  # fmt: skip
        for many in ("1 caller", "32 callers"):
            backbone.runs[Cell("fp32", name, many)] = runs
    return backbone


def test_ratios_are_taken_within_rounds() -> None:
    verdicts = list(table.verdicts(found(RATES)))
    assert verdicts == [
        line.format(load)
        for load in ("1 caller", "32 callers")
        for line in (
            "- network, fp32, {}: the defaults (cpu) answer 0.96 (0.95 to 1.00) of the images/s of "
            "the best set by hand, cpu, with 1.04 (1.00 to 1.05) of its CPU time an image: BELOW "
            "0.97",
            "- network, fp32, {}: the defaults (cpu) answer 1.01 (0.98 to 1.02) of the images/s of "
            "the plain server in fp32, with 0.99 (0.98 to 1.02) of its CPU time an image",
        )
    ]
    (*_, plain, own) = table.summary([found(RATES)])
    assert plain.endswith("| 1 | 1 | - |")
    twice = "1.01 (0.98 to 1.02), 1.01 (0.98 to 1.02)"
    assert own.endswith(f"| {twice} | {twice} | 0.96 (0.95 to 1.00), 0.96 (0.95 to 1.00) |")


def test_the_best_set_by_hand_agrees_and_is_that_of_most_rounds_not_of_one() -> None:
    lucky = found(RATES | {"openvino": (50.0, 52.0, 900.0), "cpu": (51.0, 53.0, 60.0)})
    assert lucky.best_by_hand("fp32", "32 callers") == "cpu"
    fast = found(RATES | {"openvino": (200.0, 200.0, 200.0)})
    assert fast.best_by_hand("fp32", "32 callers") == "openvino"
    fast.differences["fp32", "openvino"] = 0.03
    assert fast.best_by_hand("fp32", "32 callers") == "cpu"
    assert any("of openvino, whose answers differ, with" in line for line in table.verdicts(fast))


def test_no_image_is_sent_twice_and_all_are_decoded_alike(tmp_path: Any) -> None:
    (image, *_) = photos(write(tmp_path, 1))
    sent = [
        prediction_pb2.PredictRequest.FromString(data)
        for data in itertools.islice(load.requests("graft", [image], ["a", "b"]), 6)
    ]
    assert [request.models[0].model for request in sent] == ["a", "b"] * 3
    files = [request.images[0].encoded for request in sent]
    files += itertools.islice(load.requests("plain", [image], [""]), 6)
    assert len(set(files)) == 12
    assert {len(data) - len(image) for data in files} == {load.STAMP}
    for data in files[:: len(files) - 1]:
        np.testing.assert_array_equal(preprocess.decode(data), preprocess.decode(image))
