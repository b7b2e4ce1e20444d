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


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/graft/job", {"graft/job/memory.max": "max", "graft/memory.max": "1000"}, 1000),
        ("0::/graft/job", {"graft/job/memory.max": "900", "graft/memory.max": "1000"}, 900),
        ("0::/as/seen/outside", {"memory.max": "800"}, 800),
        ("5:cpu:/\n4:memory:/job", {"memory/job/memory.limit_in_bytes": "700"}, 700),
        ("0::/", {"memory.max": "max"}, PHYSICAL),
        ("0::/", {"memory.max": str(2**63)}, PHYSICAL),
        ("0::/", {}, PHYSICAL),
        (None, {}, PHYSICAL),
    ],
)
def test_the_least_limit_around_the_process_counts(
    own: str | None,
    limits: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in limits.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    if own is not None:
        (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(cgroups, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(cgroups, "_OWN_GROUPS", tmp_path / "own")
    assert usable_bytes() == expected
