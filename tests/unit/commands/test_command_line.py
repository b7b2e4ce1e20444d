"""The command `graft-server` itself: its subcommands, its version, and what it says unasked."""

from importlib import metadata

import pytest

from service.__main__ import main


def test_without_a_subcommand_it_says_which_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().err
    for name in ("run", "doctor"):
        assert f"\n    {name} " in said


def test_it_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code
    assert capsys.readouterr().out == f"graft-server {metadata.version('graftml-server')}\n"


@pytest.mark.parametrize("name", ["run", "doctor"])
def test_the_help_of_each_tells_its_exit_codes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    assert "Exit codes: 0 " in capsys.readouterr().out
