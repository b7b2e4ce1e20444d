"""TLS and tokens from the client's side: what is sent where, and what is said of it."""

from pathlib import Path

import pytest
from graftml import _channel, cli
from graftml.testing import FakeGraft


@pytest.mark.parametrize(
    "target",
    ["localhost:50051", "LOCALHOST:1", "127.0.0.1:50051", "127.9.9.9:1", "[::1]:50051", "localhost",
     "dns:///localhost:50051", "unix:/run/graft.sock"],
)  # fmt: skip
def test_addresses_of_this_machine_are_known(target: str) -> None:
    assert _channel.is_loopback(target)


@pytest.mark.parametrize(
    "target",
    ["graft:50051", "10.0.0.1:50051", "[fe80::1]:50051", "localhost.example:1", "0.0.0.0:50051",
     "dns:///graft.example:50051", "graft"],
)  # fmt: skip
def test_all_other_addresses_are_taken_for_other_machines(target: str) -> None:
    assert not _channel.is_loopback(target)


def test_a_token_that_leaves_the_machine_without_tls_is_warned_of(
    server: FakeGraft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["models", "--json", "--server", server.target]
    monkeypatch.setenv("GRAFT_TOKEN", "graft_ci_secret")
    assert cli.main(command) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cli, "is_loopback", lambda target: False)
    assert cli.main(command) == 0
    said = capsys.readouterr().err
    assert f"the token travels to {server.target} unencrypted: use --tls" in said
    assert "secret" not in said
    monkeypatch.delenv("GRAFT_TOKEN")
    assert cli.main(command) == 0
    assert capsys.readouterr().err == ""


def settings(token: str | None) -> _channel.Settings:
    return _channel.settings("localhost:1", None, token, (("x", "y"),), 1)


def test_a_repr_of_the_settings_tells_no_token() -> None:
    assert "secret" not in repr(settings("graft_ci_secret"))


@pytest.mark.parametrize("token", ["graft_ci_s\n", " graft_ci_s\r\n", "\tgraft_ci_s "])
def test_white_space_around_a_token_is_left_out(token: str) -> None:
    assert settings(token).metadata == (("x", "y"), ("authorization", "Bearer graft_ci_s"))
    assert settings(" \n").metadata == settings(None).metadata == (("x", "y"),)


@pytest.mark.parametrize(
    "token", ["graft_ci_sec\nret", "graft_ci_sec\0ret", "graft_ci_secr\u00e9t"]
)
def test_a_token_that_cannot_be_sent_is_refused_and_not_told(token: str) -> None:
    with pytest.raises(ValueError, match="the token holds characters that cannot be sent") as told:
        settings(token)
    assert "sec" not in repr(told.value)


def test_a_certificate_without_its_key_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for flag in ("--tls-cert", "--tls-key"):
        assert cli.main(["models", "--json", flag, str(tmp_path / "a.pem")]) == 2
        assert "must be given together" in capsys.readouterr().err


def test_a_certificate_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing.pem")
    flags = ["--tls-cert", missing, "--tls-key", missing]
    assert cli.main(["models", "--json", *flags]) == 2
    assert f"{missing}: No such file" in capsys.readouterr().err


def test_a_file_that_holds_something_else_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    key, certificate = tmp_path / "server.key", tmp_path / "server.pem"
    key.write_text("-----BEGIN EC PRIVATE KEY-----\n")
    certificate.write_text("-----BEGIN CERTIFICATE-----\n")
    for flags, told in (
        (["--tls-ca", key], f"{key} holds no certificate"),
        (["--tls-cert", key, "--tls-key", key], f"{key} holds no certificate"),
        (["--tls-cert", certificate, "--tls-key", certificate], f"{certificate} holds no private"),
    ):
        assert cli.main(["models", "--json", *map(str, flags)]) == 2
        assert told in capsys.readouterr().err


def test_a_token_is_given_without_the_word_before_it() -> None:
    with pytest.raises(ValueError, match="begins with 'Bearer': leave that out") as told:
        settings("Bearer graft_ci_secret")
    assert "secret" not in repr(told.value)
