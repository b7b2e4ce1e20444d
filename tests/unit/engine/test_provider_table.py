"""The choice of providers from timings, and the file that keeps it."""

from pathlib import Path

import numpy as np
import pytest

from service.engine.provider_table import (
    AGREE,
    Measured,
    ProviderTable,
    Timing,
    choose,
    machine_key,
    paired,
)
from service.engine.providers import ProviderName

MACHINE = {"processor": "a"}
AGREED: dict[ProviderName, float] = {"openvino": 1e-5}


def timings(cores: int, cpu_ms: float, openvino_ms: float, batch: int = 1) -> list[Timing]:
    """As measured on a quiet machine, where all cores compute."""
    rows: list[tuple[ProviderName, float]] = [("cpu", cpu_ms), ("openvino", openvino_ms)]
    return [
        Timing(name, cores, batch, batch * ms / cores / 1000, batch * ms / 1000, ms / cpu_ms)
        for name, ms in rows
    ]


@pytest.mark.parametrize(
    ("cpu_ms", "openvino_ms", "chosen"),
    [
        pytest.param(10.4, 7.6, "openvino", id="efficientnet_lite0, Intel with AVX-512, no AMX"),
        pytest.param(25.0, 25.4, "cpu", id="resnet18, Intel with AVX-512, no AMX"),
        pytest.param(28.0, 30.1, "cpu", id="resnet18, AMD with AVX2"),
        pytest.param(8.0, 6.4, "openvino", id="int8 resnet18, Intel with VNNI"),
    ],
)
def test_the_quickest_on_each_kind_of_processor(
    cpu_ms: float, openvino_ms: float, chosen: str
) -> None:
    found = [*timings(1, cpu_ms, openvino_ms), *timings(1, cpu_ms, openvino_ms, 4)]
    assert choose(found, "cpu", AGREED) == {1: chosen}


def test_widths_are_chosen_apart_and_batches_together() -> None:
    found = [*timings(2, 10, 12), *timings(1, 10, 12), *timings(1, 10, 7, 4)]
    assert choose(found, "cpu", AGREED) == {1: "openvino", 2: "cpu"}
    found = [*timings(1, 10, 14), *timings(1, 10, 8, 4)]
    assert choose(found, "cpu", AGREED) == {1: "cpu"}


def test_a_small_gain_changes_nothing() -> None:
    assert choose(timings(1, 10, 9.95), "cpu", AGREED) == {1: "cpu"}
    assert choose(timings(1, 10, 9.85), "cpu", AGREED) == {1: "openvino"}


@pytest.mark.parametrize("difference", [AGREE * 1.01, float("nan"), None])
def test_what_does_not_agree_is_not_taken_however_quick(difference: float | None) -> None:
    differences: dict[ProviderName, float] = {}
    if difference is not None:
        differences["openvino"] = difference
    assert choose(timings(1, 10, 1), "cpu", differences) == {1: "cpu"}


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_neighbour_decides_nothing(seed: int) -> None:
    random = np.random.default_rng(seed)
    # The machine's speed comes and goes, and every fourth run is interrupted.
    speeds = np.repeat(random.uniform(0.6, 1.6, 7), 5)[:31]
    interrupted = 1 + 2 * (random.uniform(size=(2, 31)) < 0.25)
    first_s, own_s = speeds * interrupted * 0.01
    assert paired(list(first_s), list(own_s)) == pytest.approx(1)
    assert paired(list(first_s), list(own_s * 0.8)) == pytest.approx(0.8)


def test_what_the_rounds_do_not_show_is_no_gain() -> None:
    ratios = [1.02, 0.9] * 15 + [0.9]  # of 31 rounds 16 are quicker, which may be chance
    assert paired([1.0] * 31, ratios) == 1.02
    assert paired([1.0] * 31, [1.02] * 10 + [0.9] * 21) == 0.9
    assert paired([1.0] * 3, [0.5, 0.6, 0.7]) == 0.7


def measured(providers: dict[int, ProviderName]) -> Measured:
    return Measured("fp32", timings(1, 10, 7), AGREED, providers, 4, 0.01)


def test_the_table_is_kept_and_is_of_one_machine(tmp_path: Path) -> None:
    path = tmp_path / "providers.json"
    table = ProviderTable(path, MACHINE)
    assert table.get("d1") is None
    table.put("d1", measured({1: "openvino"}))
    again = ProviderTable(path, MACHINE)
    assert again.get("d1") == measured({1: "openvino"})
    assert ProviderTable(path, {"processor": "b"}).backbones() == {}
    assert [each.name for each in tmp_path.iterdir()] == ["providers.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b'{"machine": 3}'])
def test_a_file_that_is_no_table_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "providers.json"
    path.write_bytes(content)
    table = ProviderTable(path, MACHINE)
    table.put("d1", measured({1: "cpu"}))
    assert ProviderTable(path, MACHINE).get("d1") is not None


def test_what_cannot_be_written_is_known_in_memory(tmp_path: Path) -> None:
    table = ProviderTable(tmp_path / "gone" / "providers.json", MACHINE)
    table.put("d1", measured({1: "cpu"}))
    assert table.get("d1") is not None


def test_the_table_is_bounded() -> None:
    table = ProviderTable(None, MACHINE)
    for n in range(1010):
        table.put(str(n), measured({1: "cpu"}))
    assert (len(table.backbones()), table.get("9"), table.get("10") is None) == (1000, None, False)


def test_the_machine_is_described_by_what_timings_depend_on() -> None:
    key = machine_key()
    assert {"processor", "flags", "cores", "quota"} <= key.keys()
    assert any(name.startswith("onnxruntime") for name in key)
    assert key == machine_key()
