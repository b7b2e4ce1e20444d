"""The server is killed at a point drawn by lot, in the middle of a day's work."""

import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import graftml
import pytest

from tests.e2e.conftest import GUARD_S, Ended
from tests.e2e.faults.house import House, until_death

pytestmark = pytest.mark.e2e

REACHED = 70
"""Points that a day's work passes, about."""

SEEDS = [int(os.environ["FAULTS_SEED"])] if "FAULTS_SEED" in os.environ else list(range(3))
"""Always the same draws, so that what fails fails again; the variable makes another."""

Told = dict[str, str]
"""What the server has answered, by step."""
Step = Callable[[graftml.Client, Told], str]


def trains(model: str, request_id: str) -> Step:
    def train(client: graftml.Client, told: Told) -> str:
        job = client.fine_tune(told["upload"], model, request_id=request_id)
        # Started is answered before ended is.
        assert told.setdefault(request_id, job.job_id) == job.job_id
        return f"{job.job_id} {job.wait(GUARD_S).version}"

    return train


def deletes(delete: Callable[[graftml.Client], None]) -> Step:
    def step(client: graftml.Client, told: Told) -> str:
        # Done before the death, and not answered.
        with suppress(graftml.errors.NotFound):
            delete(client)
        return "done"

    return step


def day(images: Path) -> dict[str, Step]:
    """Each step can be done again when its answer was lost."""
    return {
        "upload": lambda client, told: client.upload_dataset(images).dataset_id,
        "first bees": trains("bees", "a"),
        "ants": trains("ants", "b"),
        "second bees": trains("bees", "c"),
        "alias": lambda client, told: str(client.set_alias("bees", "live", 2).aliases["live"]),
        "a version goes": deletes(lambda client: client.delete_version("bees", 1)),
        "a model goes": deletes(lambda client: client.delete_model("ants")),
    }


def go_on(client: graftml.Client, steps: dict[str, Step], told: Told) -> None:
    for name, step in steps.items():
        if name not in told:
            told[name] = step(client, told)


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_that_was_answered_is_lost_wherever_the_server_is_killed(
    house: House, images: Path, seed: int
) -> None:
    steps, told = day(images), Told()
    number = random.Random(seed).randint(1, REACHED)
    try:
        client = house.start(f"kill@*#{number}")
    except Ended:
        client = house.start()
    else:
        with until_death():
            # The reader of the images counts points of its own, and may die before its server.
            with suppress(graftml.errors.ResourceExhausted):
                go_on(client, steps, told)
            house.server.process.kill()
        house.died()
        client = house.start()
    go_on(client, steps, told)

    jobs = {job.job_id: job for job in client.list_jobs()}
    assert set(jobs) == {told[request_id] for request_id in "abc"}
    for step in ("first bees", "ants", "second bees"):
        job_id, version = told[step].split()
        assert (jobs[job_id].state, jobs[job_id].version) == ("SUCCEEDED", int(version))
    assert [model.name for model in client.list_models()] == ["bees"]
    assert dict(client.get_model("bees").aliases) == {"latest": 2, "live": 2}
    assert [version.version for version in client.list_versions("bees")] == [2]
    [answer] = client.predict(next(images.glob("green/*")), model="bees", alias="live")
    assert answer.label == "green"
    house.is_sound()
