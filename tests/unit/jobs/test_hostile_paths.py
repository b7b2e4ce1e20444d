"""Folders that were allowed when a job was asked for, and lead elsewhere when it begins."""

from pathlib import Path

import pytest

from service.contract import DomainAdaptation
from service.domain import JobState
from service.errors import Reason
from tests.unit.jobs.conftest import Queue
from tests.unit.jobs.house import MakeHouse, good


@pytest.mark.parametrize("is_target", [False, True])
async def test_a_folder_that_became_a_link_to_outside_is_not_read(
    make_house: MakeHouse, queue: Queue, folder: str, tmp_path: Path, is_target: bool
) -> None:
    house = make_house(good())
    asked = tmp_path / "asked"
    asked.mkdir()
    job = (
        queue(server_path=folder, target_path=str(asked), method=DomainAdaptation())
        if is_target
        else queue(server_path=str(asked))
    )
    asked.rmdir()
    asked.symlink_to("/usr")
    await house.supervisor.start()
    ended = await house.ended(job.job_id)
    await house.supervisor.close(5)
    assert ended.state is JobState.FAILED
    assert ended.error_reason is Reason.PATH_NOT_ALLOWED
    assert house.launcher.started.empty()
