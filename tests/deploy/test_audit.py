"""The audit calls nothing good that it could not ask about."""

import importlib.util
from types import ModuleType

import pytest

from tests.deploy.queries import DEPLOY


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", DEPLOY / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOUND = {"name": "sound", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNHEARD = {"name": "unheard", "skip_reason": "not found"}
OURS = {"name": "graftml-server", "skip_reason": "editable"}


@pytest.mark.parametrize(
    ("pypi", "osv", "code", "told"),
    [
        ([SOUND, OURS], "not reached", 0, "1 packages asked of pypi"),
        ([SOUND, BAD], "not reached", 1, "VULNERABLE: bad 2: CVE-1 (fixed in 3)"),
        ([SOUND, UNHEARD], [SOUND, SOUND], 0, "2 packages asked of osv"),
        ([SOUND, UNHEARD], "not reached", 3, "NOT ASKED of osv: not reached"),
        ([UNHEARD, BAD], "not reached", 1, "CVE-1"),
        ("not reached", "not reached", 3, "NOT ASKED of pypi: not reached"),
    ],
)
def test_only_what_was_asked_of_every_package_passes(
    pypi: object,
    osv: object,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    audit = program()
    answers = {"pypi": pypi, "osv": osv}

    def ask(service: str, arguments: object) -> object:
        said = answers[service]
        return said if isinstance(said, str) else audit.read(said)

    monkeypatch.setattr(audit, "ask", ask)
    assert audit.audit("list", []) == code
    assert told in capsys.readouterr().out
