"""What memory may be used, and every way in which a lack of it shows."""

import os
from pathlib import Path

import pytest
import torch

from service.contract import ExitCode, Failed
from service.errors import Reason
from service.ops import cgroups
from tests.trainer.conftest import MakeSpec, Told
from trainer import train
from trainer.__main__ import _train
from trainer.memory import is_out_of_memory, usable_bytes

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_torch_raises_on_a_cpu_without_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError("can't allocate memory"))


def test_a_job_that_a_cpu_has_no_memory_for_fails_with_that_reason(
    make_spec: MakeSpec, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "run", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    assert _train(make_spec(tmp_path), told.append) == ExitCode.FAILED
    (failed,) = told.of(Failed)
    assert isinstance(failed, Failed)
    assert failed.reason == Reason.OUT_OF_MEMORY


@pytest.mark.parametrize(("limit", "expected"), [(1000, 1000), (None, PHYSICAL)])
def test_a_limit_of_the_control_groups_counts_before_the_machines_memory(
    limit: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "limit_bytes", lambda: limit)
    assert usable_bytes() == expected
