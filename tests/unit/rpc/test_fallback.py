import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from service.domain import Decision, ModelFiles
from service.engine.engine import Decode, Outcome
from service.errors import Damaged, Expired, NotFound, Reason
from service.ops.metrics import Metrics
from service.rpc.fallback import Fallback

FILES = Path("none")


class Engine:
    """Refuses the versions that are damaged; notes what it was asked."""

    def __init__(self, *damaged: int) -> None:
        self.damaged = damaged
        self.asked: list[tuple[int, float]] = []
        self.decided_by: list[Decision | None] = []
        self.takes_s = 0.0

    async def classify(
        self,
        files: ModelFiles,
        images: Sequence[Decode],
        timeout_s: float,
        decision: Decision | None,
        *,
        finish: Callable[[list[Outcome]], Any],
    ) -> Any:
        self.asked.append((files.version, timeout_s))
        self.decided_by.append(decision)
        await asyncio.sleep(self.takes_s)
        if files.version in self.damaged:
            raise Damaged(Reason.MODEL_UNLOADABLE, f"{files.version} is damaged")
        return finish([])


@dataclass(frozen=True)
class Record:
    """A version."""

    files: ModelFiles

    @property
    def version(self) -> int:
        return self.files.version


class Models:
    """Versions by number; 3 is what every alias points to."""

    def __init__(self, fallbacks: Sequence[int], gone: Sequence[int]) -> None:
        self._fallbacks, self._gone = list(fallbacks), gone

    def remembered(self, *_: object) -> None:
        return None

    def resolve(self, model: str, version: int | None, alias: str | None) -> Record:
        number = version or 3
        if number in self._gone:
            raise NotFound(Reason.VERSION_NOT_FOUND, "gone")
        return Record(ModelFiles(model, number, "b", FILES, "h", FILES))

    def fallbacks(self, model: str, alias: str | None) -> list[int]:
        return self._fallbacks


class Classifier:
    """A `Fallback` whose answers are the version and the outcomes."""

    def __init__(self, engine: Any, models: Any) -> None:
        self._fallback = Fallback(engine, models, Metrics({"version": "test"}))

    async def classify(
        self,
        model: str,
        version: int | None,
        alias: str | None,
        images: Sequence[Decode],
        timeout_s: float,
        decision: Decision | None = None,
    ) -> tuple[int, list[Outcome]]:
        return await self._fallback.classify(
            model, version, alias, images, timeout_s, decision, lambda *answer: answer
        )


def serving(engine: Engine, *fallbacks: int, gone: Sequence[int] = ()) -> Classifier:
    return Classifier(engine, Models(fallbacks, gone))


async def test_the_version_that_is_meant_answers() -> None:
    engine = Engine()
    assert await serving(engine, 2, 1).classify("m", None, "prod", [], 5) == (3, [])
    assert [version for version, _ in engine.asked] == [3]


async def test_the_first_whole_one_that_may_stand_in_answers() -> None:
    engine, balanced = Engine(3, 2), Decision(rule="balanced")
    assert await serving(engine, 2, 1).classify("m", None, None, [], 5, balanced) == (1, [])
    assert [version for version, _ in engine.asked] == [3, 2, 1]
    assert engine.decided_by == [balanced] * 3


async def test_one_that_was_deleted_meanwhile_is_passed_over() -> None:
    engine = Engine(3)
    assert await serving(engine, 2, 1, gone=[2]).classify("m", None, None, [], 5) == (1, [])


async def test_a_version_that_is_named_by_its_number_has_nothing_that_stands_in() -> None:
    engine = Engine(3)
    with pytest.raises(Damaged, match="3 is damaged"):
        await serving(engine, 2, 1).classify("m", 3, None, [], 5)
    assert [version for version, _ in engine.asked] == [3]


async def test_when_none_is_whole_the_one_that_was_meant_is_told() -> None:
    with pytest.raises(Damaged, match="3 is damaged"):
        await serving(Engine(3, 2, 1), 2, 1).classify("m", None, "prod", [], 5)
    with pytest.raises(Damaged, match="3 is damaged"):
        await serving(Engine(3)).classify("m", None, "prod", [], 5)


async def test_what_stands_in_has_the_time_that_is_left() -> None:
    engine = Engine(3)
    engine.takes_s = 0.02
    await serving(engine, 2).classify("m", None, None, [], 600)
    (_, first_s), (_, left_s) = engine.asked
    assert first_s <= 600
    assert left_s <= first_s - 0.02


async def test_another_error_is_the_calls_own() -> None:
    engine = Engine(3)
    full = serving(engine, 2)
    engine.damaged = (3,)

    async def expire(*_: object, **__: object) -> list[Outcome]:
        raise Expired(Reason.DEADLINE_EXCEEDED, "late")

    engine.classify = expire  # type: ignore[method-assign]
    with pytest.raises(Expired):
        await full.classify("m", None, None, [], 5)


async def test_a_version_that_was_deleted_during_its_call_is_not_found() -> None:
    engine = Engine(3)

    class Deleted(Models):
        """Loses version 3 once the engine was asked for it; an alias leads to 2 by then."""

        def resolve(self, model: str, version: int | None, alias: str | None) -> Record:
            if engine.asked and version == 3:
                raise NotFound(Reason.VERSION_NOT_FOUND, "gone")
            return super().resolve(model, version or (2 if engine.asked else 3), alias)

    classifier = Classifier(engine, Deleted([], []))
    with pytest.raises(NotFound):
        await classifier.classify("m", 3, None, [], 5)
    engine.asked.clear()
    assert await classifier.classify("m", None, None, [], 5) == (2, [])
