"""The `graft-token` command: what it prints, and what it does to an access file."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.auth import access_file, token_cli

TOKEN = r"graft_[a-z0-9.-]+_[A-Za-z0-9_-]{43}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "access.toml"


def make(*flags: str) -> int:
    return token_cli.main(["--tenant", "acme", "--role", "train", *flags])


def test_it_prints_a_token_once_and_lines_that_hold_its_hash(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert make("--role", "predict", "--id", "ci") == 0
    out = capsys.readouterr().out
    (token,) = re.findall(TOKEN, out)
    token_id, secret = access_file.split(token) or ("", "")
    lines = out.partition("access file:")[2]
    found = access_file.parse(f"[tenants.acme]\n{lines}".encode(), ())
    assert found.tokens[token_id].is_of(secret)
    assert found.tokens["ci"].caller.roles == {"train", "predict"}
    assert secret not in lines


def test_no_two_tokens_are_alike(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        make()
    made = re.findall(TOKEN, capsys.readouterr().out)
    assert len({access_file.split(token) for token in made}) == 2


def test_a_new_file_is_its_owners_alone_and_can_be_used_at_once(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("--id", "ci", "--file", str(file)) == 0
    assert file.stat().st_mode & 0o777 == 0o600
    printed = capsys.readouterr()
    token_id, secret = access_file.split(printed.out.strip()) or ("", "")
    found, _ = access_file.read(file, ())
    assert found.tokens[token_id].is_of(secret)
    assert secret not in file.read_text() + printed.err


def test_what_stands_in_a_file_stays_with_its_mode_and_its_link(file: Path, tmp_path: Path) -> None:
    before = "# ours\n[tenants.zoo]  # since May\nstored_mb = 7\n"
    file.write_text(before)
    file.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    for name in ("a", "b"):
        assert make("--id", name, "--file", str(link)) == 0
    after = file.read_text()
    assert after.startswith(before)
    assert after.count("[tenants.acme]") == 1
    assert list(access_file.read(file, ())[0].tokens) == ["a", "b"]
    assert file.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["access.toml", "link.toml"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[tenants.", "end of document"),
        ("[tenants.acme]\nstored_gb = 1\n", "stored_gb"),
        ("tokens = []\n[tenants.acme]\n", r"write tenants as \[tenants.NAME\]"),
        ("tenants = { zoo = {} }\n", r"write tenants as \[tenants.NAME\]"),
    ],
)
def test_a_file_that_cannot_be_added_to_is_left_as_it_is(
    file: Path, capsys: pytest.CaptureFixture[str], content: str, says: str
) -> None:
    file.write_text(content)
    assert make("--file", str(file)) == 2
    said = capsys.readouterr()
    assert re.search(says, said.err)
    assert said.out == ""
    assert file.read_text() == content
    assert list(file.parent.iterdir()) == [file]


def test_an_id_that_is_taken_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("--id", "ci", "--file", str(file)) == 0
    before = file.read_text()
    assert make("--id", "ci", "--file", str(file)) == 2
    assert "has a token 'ci' already" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize(
    "flags", [["--tenant", "a/b"], ["--tenant", ""], ["--id", "a_b"], ["--id", 'x"'], ["--id", "A"]]
)
def test_names_that_the_file_could_not_hold_are_refused(
    file: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert make("--file", str(file), *flags) == 2
    assert "graft-token: " in capsys.readouterr().err
    assert not file.exists()


def test_a_tenant_with_signs_that_toml_or_ids_do_not_take_is_written_so_that_they_do(
    file: Path,
) -> None:
    for _ in range(2):
        assert make("--tenant", "north.west_2", "--file", str(file)) == 0
    found = access_file.read(file, ())[0].tokens
    assert {token.caller.tenant for token in found.values()} == {"north.west_2"}


def test_a_folder_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("--file", str(tmp_path / "no" / "access.toml")) == 1
    assert "No such file" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make("--id", "ci", "--file", str(file)) == 0
    before = file.read_text()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert make("--id", "b", "--file", str(file)) == 1
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


def test_many_at_once_lose_no_token(file: Path) -> None:
    command = [sys.executable, "-m", "service.auth.token_cli", "--tenant=acme", "--role=train"]
    running = [
        subprocess.Popen(
            [*command, f"--file={file}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    for process in running:
        process.communicate(timeout=300)
        assert process.returncode == 0
    assert len(access_file.read(file, ())[0].tokens) == 4
