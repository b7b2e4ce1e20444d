"""The turn of a ranking: who has it while a thread still works, and how long it is waited for."""

import asyncio
import errno
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from service.contract import BackbonesRanked, RankSpec
from service.errors import Exhausted, OverQuota, Reason
from service.jobs import ranking
from service.jobs.fake_launcher import FakeLauncher, Script
from service.jobs.ranking import Rankings
from service.jobs.request import RankRequest
from service.jobs.settings import Settings
from tests.unit.jobs.house import GUARD_S
from tests.unit.storage.conftest import TENANT

RANKED = BackbonesRanked([], "", 1)


class Slow(Rankings):
    """The first one unpacks until it is let go on."""

    def __init__(self, tmp_path: Path, *, is_shared: bool = False) -> None:
        settings = Settings(
            work_dir=tmp_path,
            weights_dir=tmp_path,
            allowed_dirs_of=lambda _: (),
            default_backbone="resnet18",
            cpu_jobs=1,
            gpu_jobs=0,
            has_gpu=False,
            max_job_s=1000,
        )
        nothing: Any = None
        super().__init__(
            nothing, nothing, FakeLauncher(Script(records=[RANKED])), settings, lambda: is_shared
        )
        self.turns: list[str] = []
        self.unpacking = threading.Semaphore(0)
        self.go_on = threading.Event()

    def _spec(
        self, request: RankRequest, folder: Path, used: ExitStack, stop: threading.Event
    ) -> RankSpec:
        self.turns.append(request.tenant)
        self.unpacking.release()
        assert self.go_on.wait(GUARD_S)
        return RankSpec(
            data_dir="/data", backbones=[], weights_dir="/weights", work_dir=str(folder)
        )


def asks(rankings: Slow, tenant: str) -> "asyncio.Task[BackbonesRanked]":
    return asyncio.create_task(rankings.rank(RankRequest(tenant=tenant, dataset_id="ds-1")))


async def unpacks(rankings: Slow) -> "asyncio.Task[BackbonesRanked]":
    call = asyncio.create_task(rankings.rank(RankRequest(tenant=TENANT, dataset_id="ds-1")))
    assert await asyncio.to_thread(rankings.unpacking.acquire, timeout=GUARD_S)
    return call


async def test_a_call_that_is_cancelled_keeps_its_turn_for_as_long_as_it_unpacks(
    tmp_path: Path,
) -> None:
    rankings = Slow(tmp_path)
    cancelled = await unpacks(rankings)
    cancelled.cancel()
    after = asyncio.create_task(rankings.rank(RankRequest(tenant=TENANT, dataset_id="ds-1")))
    assert not await asyncio.to_thread(rankings.unpacking.acquire, timeout=0.1), "two at once"
    rankings.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await after == RANKED


async def test_a_turn_that_does_not_come_in_time_is_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rankings = Slow(tmp_path)
    first = await unpacks(rankings)
    with monkeypatch.context() as patch:
        patch.setattr(ranking, "MAX_WAIT_S", 0.02)
        with pytest.raises(Exhausted) as caught:
            await asyncio.wait_for(
                rankings.rank(RankRequest(tenant=TENANT, dataset_id="ds-1")), GUARD_S
            )
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_s
    rankings.go_on.set()
    assert await first == RANKED
    # The turn is free again.
    assert await rankings.rank(RankRequest(tenant=TENANT, dataset_id="ds-1")) == RANKED


async def test_tenants_take_turns_whoever_asked_first(tmp_path: Path) -> None:
    rankings = Slow(tmp_path)
    calls = [asks(rankings, tenant) for tenant in (*["acme"] * 4, "beta", "beta", "zoo")]
    assert await asyncio.to_thread(rankings.unpacking.acquire, timeout=GUARD_S)
    # Whoever leaves takes no turn.
    calls.pop(1).cancel()
    rankings.go_on.set()
    assert await asyncio.gather(*calls) == [RANKED] * 6
    assert rankings.turns == ["acme", "beta", "zoo", "acme", "beta", "acme"]


async def test_where_there_are_several_tenants_one_has_half_of_the_places(tmp_path: Path) -> None:
    rankings = Slow(tmp_path, is_shared=True)
    taken = [asks(rankings, "acme") for _ in range(5)]
    with pytest.raises(Exhausted, match="5 of your rankings") as caught:
        await asks(rankings, "acme")
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.QUEUE_FULL, 15)
    taken += [asks(rankings, "beta") for _ in range(4)]
    with pytest.raises(Exhausted, match="8 rankings"):
        await asks(rankings, "zoo")
    rankings.go_on.set()
    assert await asyncio.gather(*taken) == [RANKED] * 9


async def test_a_file_system_that_times_out_is_not_taken_for_the_time_budget(
    tmp_path: Path,
) -> None:
    rankings = Slow(tmp_path)
    rankings.go_on.set()

    async def start(*_: object) -> Any:
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    rankings._launcher.start = start  # type: ignore[method-assign]
    with pytest.raises(OSError, match="timed out"):
        await asks(rankings, "acme")


async def test_of_one_tenant_so_many_wait_or_run_and_others_are_taken(tmp_path: Path) -> None:
    rankings = Slow(tmp_path)

    def asks(tenant: str, max_open: int | None = 2) -> "asyncio.Task[BackbonesRanked]":
        request = RankRequest(dataset_id="ds-1", tenant=tenant)
        return asyncio.create_task(rankings.rank(request, max_open))

    taken = [asks("acme"), asks("acme")]
    with pytest.raises(OverQuota, match="wait for one") as caught:
        await asks("acme")
    assert (caught.value.subject, caught.value.reason) == ("rankings", Reason.QUOTA_EXCEEDED)
    assert caught.value.retry_after_s
    with pytest.raises(OverQuota):
        rankings.check_room("acme", 2)
    with pytest.raises(OverQuota, match="no jobs") as caught:
        await asks("zoo", 0)
    assert caught.value.retry_after_s is None
    taken += [asks("beta"), *(asks("default", None) for _ in range(3))]
    rankings.go_on.set()
    assert await asyncio.gather(*taken) == [RANKED] * 6
    # Those that have ended count no more.
    assert await asyncio.gather(asks("acme"), asks("acme")) == [RANKED] * 2
