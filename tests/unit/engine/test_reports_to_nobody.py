"""The libraries that compute tell their makers nothing: seen by what they keep for it at home."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORT_BOTH = """
import importlib.util
import onnxruntime
if importlib.util.find_spec("openvino"):
    import openvino
    openvino.Core()
"""


def left_at_home(program: str, home: Path) -> list[str]:
    # Some of them are silent in CI by themselves.
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"HOME": str(home), "TMPDIR": str(home)}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=600, check=True)
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))


@pytest.mark.parametrize("room", ["service.app", "trainer.quantise"])
def test_nothing_is_kept_for_reports(room: str, tmp_path: Path) -> None:
    left = left_at_home(f"import {room}\n{IMPORT_BOTH}", tmp_path)
    # A folder that PyTorch makes and does not use.
    assert [name for name in left if not name.startswith("torchinductor")] == []
