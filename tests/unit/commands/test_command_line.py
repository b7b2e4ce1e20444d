"""The command `graft-server` itself: its subcommands, its version, and what it says unasked."""

from importlib import metadata

import pytest

from service import fsck
from service.__main__ import main


def test_without_a_subcommand_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().err
    for name in ("run", "check", "backup", "restore", "tokens", "doctor"):
        assert f"\n    {name} " in said


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"graft-server {metadata.version('graftml-server')}\n"


@pytest.mark.parametrize("name", ["run", "check", "backup", "restore", "tokens", "doctor"])
def test_the_help_of_each_tells_its_exit_codes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    assert "Exit codes: 0 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            PermissionError(13, "Permission denied", "x/y"),
            2,
            "cannot check: x/y: Permission denied",
        ),
    ],
)
def test_what_ends_a_command_is_one_line(
    error: BaseException,
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(fsck, "problems", fail)
    assert main(["check", "data"]) == code
    assert capsys.readouterr() == ("", f"graft-server: {says}\n")


def test_a_flag_that_is_none_is_told_with_what_may_be_meant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--prot", "50052"])
    assert ended.value.code == 2
    assert "--prot 50052; did you mean --port?" in capsys.readouterr().err
