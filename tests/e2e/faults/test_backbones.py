"""The server, or what checks a file, is killed while a backbone is registered or deleted."""

import threading
from pathlib import Path

import graftml
import pytest

from tests.e2e.conftest import GUARD_S
from tests.e2e.faults.house import House, until_death, wait_until
from tests.extractors import MEAN, SIZE, STD, write

pytestmark = pytest.mark.e2e


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.onnx")


def register(client: graftml.Client, file: Path) -> graftml.Backbone:
    return client.register_backbone(file, "tiny", size=SIZE, mean=MEAN, std=STD)


def registered(client: graftml.Client) -> list[str]:
    return [each.name for each in client.list_backbones() if each.source == "registered"]


def test_a_backbone_whose_server_is_killed_is_registered_once_or_never_was(
    house: House, file: Path
) -> None:
    for point in ("backbone.stored", "backbone.kept"):
        client = house.start(f"kill@{point}")
        assert registered(client) == []
        with until_death():
            register(client, file)
            raise AssertionError("it was answered")
        house.died()
    client = house.start()
    assert registered(client) == ["onnx/tiny"]
    assert register(client, file).name == "onnx/tiny"
    assert registered(client) == ["onnx/tiny"]
    house.is_sound()


def test_a_backbone_whose_check_dies_is_refused_and_the_server_goes_on(
    house: House, file: Path
) -> None:
    client = house.start("kill@backbone.checking")
    with pytest.raises(graftml.ResourceExhausted) as refused:
        register(client, file)
    assert refused.value.reason == "OUT_OF_MEMORY"
    assert registered(client) == []
    assert register(client, file).name == "onnx/tiny"
    house.is_sound()


def test_a_check_that_hangs_ends_with_its_server(house: House, file: Path, tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    client = house.start(f"hang@backbone.checking!{hangs}")

    def send() -> None:
        with until_death():
            register(client, file)

    sending = threading.Thread(target=send)
    sending.start()
    wait_until(hangs.exists)
    assert len(house.trainers()) == 1
    house.kill()
    sending.join(GUARD_S)
    client = house.start()
    assert registered(client) == []
    house.is_sound()
