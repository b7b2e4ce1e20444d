"""`graft-server tokens`: what it prints, and what it does to an access file."""

import datetime
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.__main__ import main
from service.auth import access_file

TOKEN = r"graft_[a-z0-9.-]+_[A-Za-z0-9_-]{43}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "access.toml"


def make(*flags: str) -> int:
    return main(["tokens", "create", "--tenant", "acme", "--role", "train", *flags])


def test_it_prints_a_token_once_and_lines_that_hold_its_hash(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert make("--role", "predict", "--id", "ci") == 0
    out = capsys.readouterr().out
    (token,) = re.findall(TOKEN, out)
    token_id, secret = access_file.split(token) or ("", "")
    lines = out.partition("access file:")[2]
    found = access_file.parse(f"[tenants.acme]\n{lines}".encode(), ())
    assert found.tokens[token_id].matches(secret)
    assert found.tokens["ci"].principal.roles == {"train", "predict"}
    assert secret not in lines


def test_no_two_tokens_are_alike(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        make()
    made = re.findall(TOKEN, capsys.readouterr().out)
    assert len({access_file.split(token) for token in made}) == 2


def test_a_new_file_is_its_owners_alone_and_can_be_used_at_once(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("--id", "ci", "--access-file", str(file)) == 0
    assert file.stat().st_mode & 0o777 == 0o600
    printed = capsys.readouterr()
    token_id, secret = access_file.split(printed.out.strip()) or ("", "")
    found = access_file.read(file, ())
    assert found.tokens[token_id].matches(secret)
    assert secret not in file.read_text() + printed.err


def test_what_stands_in_a_file_stays_with_its_mode_and_its_link(file: Path, tmp_path: Path) -> None:
    before = "# ours\n[tenants.zoo]  # since May\nstored_mb = 7\n"
    file.write_text(before)
    file.chmod(0o640)
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    for name in ("a", "b"):
        assert make("--id", name, "--access-file", str(link)) == 0
    after = file.read_text()
    assert after.startswith(before)
    assert after.count("[tenants.acme]") == 1
    assert list(access_file.read(file, ()).tokens) == ["a", "b"]
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
    assert make("--access-file", str(file)) == 2
    said = capsys.readouterr()
    assert re.search(says, said.err)
    assert said.out == ""
    assert file.read_text() == content
    assert list(file.parent.iterdir()) == [file]


def test_an_id_that_is_taken_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("--id", "ci", "--access-file", str(file)) == 0
    before = file.read_text()
    assert make("--id", "ci", "--access-file", str(file)) == 2
    assert "has a token 'ci' already" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize(
    "flags", [["--tenant", "a/b"], ["--tenant", ""], ["--id", "a_b"], ["--id", 'x"'], ["--id", "A"]]
)
def test_names_that_the_file_could_not_hold_are_refused(
    file: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert make("--access-file", str(file), *flags) == 2
    assert "graft-server: " in capsys.readouterr().err
    assert not file.exists()


def test_a_tenant_with_signs_that_toml_or_ids_do_not_take_is_written_so_that_they_do(
    file: Path,
) -> None:
    for _ in range(2):
        assert make("--tenant", "north.west_2", "--access-file", str(file)) == 0
    found = access_file.read(file, ()).tokens
    assert {token.principal.tenant for token in found.values()} == {"north.west_2"}


def test_a_folder_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make("--access-file", str(tmp_path / "no" / "access.toml")) == 1
    assert "No such file" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make("--id", "ci", "--access-file", str(file)) == 0
    before = file.read_text()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert make("--id", "b", "--access-file", str(file)) == 1
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


def test_many_at_once_lose_no_token(file: Path) -> None:
    command = [sys.executable, "-m", "service", "tokens", "create"]
    command += ["--tenant=acme", "--role=train"]
    running = [
        subprocess.Popen(
            [*command, f"--access-file={file}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    for process in running:
        process.communicate(timeout=300)
        assert process.returncode == 0
    assert len(access_file.read(file, ()).tokens) == 4


# Expiry


def expiry(file: Path, token_id: str) -> float:
    return access_file.read(file, ()).tokens[token_id].expires_at


def test_a_token_expires_after_a_time_or_at_the_end_of_a_day(file: Path) -> None:
    before = time.time()
    for name, flags in {
        "days": ["--expires-in=90d"],
        "weeks": ["--expires-in=2w"],
        "hours": ["--expires-in=12h"],
        "date": ["--expires-on=2999-01-31"],
        "never": [],
    }.items():
        assert make("--id", name, "--access-file", str(file), *flags) == 0
    after = time.time()
    for name, days in {"days": 90, "weeks": 14, "hours": 0.5}.items():
        # The file holds whole seconds.
        assert before - 1 <= expiry(file, name) - days * 86400 <= after
    end = datetime.datetime(2999, 2, 1, tzinfo=datetime.UTC)
    assert expiry(file, "date") == end.timestamp()
    assert expiry(file, "never") == math.inf


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--expires-in=90", "as in 90d"),
        ("--expires-in=0d", "as in 90d"),
        ("--expires-in=-1d", "as in 90d"),
        ("--expires-in=999999w", "at most 100 years"),
        ("--expires-on=31.1.2999", "write it as 2027-01-31"),
        ("--expires-on=9999-12-31", "write it as 2027-01-31"),
        ("--expires-on=2020-01-31", "is over"),
    ],
)
def test_an_expiry_that_cannot_be_is_refused(
    file: Path, capsys: pytest.CaptureFixture[str], flag: str, says: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        make("--access-file", str(file), flag)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err
    assert not file.exists()


# List and revoke


def test_the_list_shows_ids_and_expiry_and_no_hash(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("--id", "lab", "--access-file", str(file), "--role", "predict", "--expires-on=2999-01-31")
    make("--id", "old", "--access-file", str(file))
    file.write_text(file.read_text() + "expires = 2020-01-01T00:00:00Z\n")
    make("--id", "web", "--access-file", str(file))
    capsys.readouterr()
    assert main(["tokens", "list", "--access-file", str(file)]) == 0
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines()] == [
        ["ID", "TENANT", "ROLES", "EXPIRES"],
        ["lab", "acme", "train,predict", "2999-02-01", "00:00", "UTC"],
        ["old", "acme", "train", "2020-01-01", "00:00", "UTC", "(expired)"],
        ["web", "acme", "train", "never"],
    ]
    assert main(["tokens", "list", "--json", "--access-file", str(file)]) == 0
    as_json = capsys.readouterr().out
    assert [(t["id"], t["expires"], t["has_expired"]) for t in json.loads(as_json)] == [
        ("lab", "2999-02-01T00:00:00+00:00", False),
        ("old", "2020-01-01T00:00:00+00:00", True),
        ("web", None, False),
    ]
    for token in access_file.read(file, ()).tokens.values():
        assert token.sha256 not in shown + as_json


def test_revoking_deletes_one_token_and_keeps_everything_else(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text("# ours\n[tenants.acme]  # since May\n")
    file.chmod(0o640)
    for name in ("a", "b", "c"):
        make("--id", name, "--access-file", str(file))
    before = file.read_text().replace('id = "c"', '# of the lab\nid = "c"')
    before = before.replace('[[tokens]]\nid = "b"', '[[tokens]]\n# of nobody\nid = "b"')
    file.write_text(before + "# at the end\n\n[tenants.zoo]\n")
    make("--id", "d", "--access-file", str(file))
    before = file.read_text()
    assert main(["tokens", "revoke", "b", "--access-file", str(file)]) == 0
    after = file.read_text()
    assert [*access_file.read(file, ()).tokens] == ["a", "c", "d"]
    assert file.stat().st_mode & 0o777 == 0o640
    gone = set(before.splitlines()) - set(after.splitlines())
    assert {line.partition(" ")[0] for line in gone} == {"id", "sha256", "#"}
    assert "# of nobody" in gone
    for kept in ("# ours", "# since May", "# of the lab", "# at the end", "[tenants.zoo]"):
        assert kept in after
    assert "\n\n\n" not in after
    for name in ("a", "c", "d"):
        assert main(["tokens", "revoke", name, "--access-file", str(file)]) == 0
    assert access_file.read(file, ()).tokens == {}
    assert "# made" not in file.read_text()


@pytest.mark.parametrize(
    "content",
    [
        # In another form than [[tokens]], and text that looks like its header.
        '[tenants.acme]\n[[tokens]]\nid = "a"\n{rest}\n[["tokens"]]\nid = "b"\n{rest}\n',
        'tokens = [{{ id = "b", {rest_in_line} }}]\n[tenants.acme]\n',
        '[tenants.acme]\nallowed_dirs = ["""\n[[tokens]]\n"""]\n[[tokens]]\nid = "b"\n{rest}\n',
    ],
)
def test_a_token_that_cannot_be_found_among_the_lines_is_left_to_its_operator(
    file: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    rest = [f'sha256 = "{"0" * 64}"', 'tenant = "acme"', 'roles = ["train"]']
    text = content.format(rest="\n".join(rest), rest_in_line=", ".join(rest))
    file.write_text(text)
    assert main(["tokens", "revoke", "b", "--access-file", str(file)]) == 2
    assert "delete the token 'b' by hand" in capsys.readouterr().err
    assert file.read_text() == text


def test_an_id_or_a_file_that_is_not_there_is_named(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokens", "revoke", "b", "--access-file", str(file)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["tokens", "list", "--access-file", str(file)]) == 1
    assert "No such file" in capsys.readouterr().err
    make("--id", "a", "--access-file", str(file))
    assert main(["tokens", "revoke", "b", "--access-file", str(file)]) == 2
    assert "has no token 'b'" in capsys.readouterr().err


def test_a_file_is_that_of_the_settings_where_none_is_given(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["tokens", "list"]) == 2
    assert "--access-file, or GRAFT_ACCESS_FILE" in capsys.readouterr().err
    monkeypatch.setenv("GRAFT_ACCESS_FILE", str(file))
    # What the server would refuse is nothing to a command that needs it not.
    monkeypatch.setenv("GRAFT_PORT", "none")
    assert make("--id", "ci") == 0
    assert main(["tokens", "list"]) == 0
    assert "\nci " in capsys.readouterr().out


def test_without_a_command_of_its_own_it_says_which_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["tokens"]) == 2
    said = capsys.readouterr().err
    for name in ("create", "list", "revoke"):
        assert f"\n    {name} " in said
