"""The systemd unit: sound by systemd's own check, closed, with settings that the server knows."""

import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest

from service import settings
from tests.deploy.queries import DEPLOY
from tests.e2e.conftest import GUARD_S

UNIT = DEPLOY / "systemd" / "graft-server.service"
EXPOSURE = 20
"""Tenths, as systemd weighs it: 100 is a unit without any protection."""

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze, a part of systemd, is not on the PATH",
)


def service() -> dict[str, str]:
    parser = RawConfigParser(delimiters="=", strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(UNIT)
    return dict(parser["Service"])


def analyze(*arguments: str | Path) -> str:
    done = subprocess.run(
        ["systemd-analyze", *arguments],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    # The program must exist for it.
    copy.write_text(UNIT.read_text().replace("/opt/graft/bin/graft-server", sys.executable))
    assert analyze("verify", "--man=no", copy) == ""


@needs_systemd
def test_the_server_is_shut_in() -> None:
    analyze("security", "--offline=yes", f"--threshold={EXPOSURE}", UNIT)


def test_the_unit_has_settings_that_the_server_knows_and_time_to_drain() -> None:
    unit = service()
    assert unit["ExecStart"].endswith("/graft-server run")
    environment = dict(pair.split("=") for pair in unit["Environment"].split())
    config = settings.load(
        {}, {name: value for name, value in environment.items() if name.startswith("GRAFT_")}
    )
    assert config.data_dir == Path("/var/lib") / unit["StateDirectory"]
    assert float(unit["TimeoutStopSec"]) >= config.drain_s + 10
    assert unit["RestartPreventExitStatus"] == "2"
