"""A client in another language: Node fine-tunes, watches, predicts and is refused."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from google.rpc import status_pb2

from tests.deploy.sample_image import IMAGES
from tests.e2e.conftest import GUARD_S, INSTANT, ROOT, StartService

EXAMPLE = ROOT / "clients" / "node"

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not on the PATH"),
    pytest.mark.skipif(
        not (EXAMPLE / "node_modules" / "@grpc").is_dir(),
        reason="its packages are not installed: make test does it where npm is",
    ),
]


def test_the_example_runs_as_it_stands(start_service: StartService, tmp_path: Path) -> None:
    service = start_service(module=INSTANT)
    for number, (label, content) in enumerate(IMAGES):
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / label / f"{number}.png").write_bytes(content)
    done = subprocess.run(
        ["node", EXAMPLE / "example.mjs", service.address, tmp_path / "images"],
        env={**os.environ, "GOOGLE": str(Path(status_pb2.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *events, answer, bad, refused = done.stdout.splitlines()
    assert [event.partition(" ")[2] for event in events] == [
        "JOB_STATE_QUEUED",
        "JOB_STATE_RUNNING",
        "JOB_STATE_SUCCEEDED",
    ]
    assert answer in ("answer red", "answer blue")
    assert bad.startswith("no image ")
    assert len(bad) > len("no image ")
    assert refused == "refused NOT_FOUND MODEL_NOT_FOUND"


def test_what_it_needs_is_locked_by_its_content() -> None:
    lock = json.loads((EXAMPLE / "package-lock.json").read_text())
    packages = {name: found for name, found in lock["packages"].items() if name}
    assert packages
    assert [name for name, found in packages.items() if "integrity" not in found] == []
