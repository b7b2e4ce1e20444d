"""The command's messages: in its own terms, in one line, in every encoding."""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml.cli import main
from graftml.testing import FakeGraft

LABEL = "日本語"


def test_a_model_that_aliases_name_is_deleted_by_force(
    server: FakeGraft, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add_model("pets", versions=2)
    where = ["--server", server.target]
    assert main(["models", "alias", "pets", "prod", "1", *where]) == 0
    used = graftml.FailedPrecondition(
        "delete prod first, or by force", reason=graftml.Reason.MODEL_IN_USE
    )
    server.fail("DeleteModel", used)
    assert main(["models", "delete", "pets", "--yes", *where]) == 1
    assert "delete prod first, or by force [MODEL_IN_USE]" in capsys.readouterr().err
    assert main(["models", "delete", "pets:2", "--force", *where]) == 2
    assert "--force is for a whole model" in capsys.readouterr().err
    assert main(["models", "delete", "pets", "--force", *where]) == 0
    assert capsys.readouterr().out == "deleted pets\n"


@pytest.mark.parametrize(
    ("said", "code", "told"),
    [("y\n", 0, "deleted pets"), ("\n", 2, "was not deleted"), ("", 2, "was not deleted")],
)
def test_at_a_terminal_it_is_asked_before_a_model_is_deleted(
    server: FakeGraft,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    code: int,
    told: str,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    server.add_model("pets", versions=2)
    monkeypatch.setattr(sys, "stdin", Terminal(said))
    assert main(["models", "delete", "pets", "--server", server.target]) == code
    out, err = capsys.readouterr()
    assert told in out + err
    assert "Delete pets with 2 versions? There is no way back [y/N]" in err
    # Not where nobody can answer, as in a pipe and for a program.
    server.add_model("pets")
    assert main(["models", "delete", "pets", "--json", "--server", server.target]) == 2
    assert "with --yes" in capsys.readouterr().err


def test_errors_are_json_where_that_was_asked_for(
    server: FakeGraft, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> dict[str, Any]:
        code = main([*arguments, "--server", server.target])
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        error: dict[str, Any] = json.loads(err)["error"]
        assert error.pop("exit_code") == code
        return error

    server.fail("GetModel", graftml.NotFound("see ListModels", reason="MODEL_NOT_FOUND"))
    assert told("models", "get", "pets", "--json") == {
        "message": "see ListModels", "reason": "MODEL_NOT_FOUND", "code": "NOT_FOUND",
    }  # fmt: skip
    assert told("--json", "fintune")["message"].startswith("argument COMMAND: there is no 'fint")
    assert told("finetune", "/no/such", "--name", "a", "--json")["message"].startswith("/no/such:")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fintune"], "graft: argument COMMAND: there is no 'fintune'; did you mean finetune?"),
        (
            ["models", "--server", "::1:50051"],
            "'::1:50051' is not an address: write an IPv6 address",
        ),
        (
            ["jobs", "wach"],
            "graft: argument ACTION: there is no 'wach'; did you mean watch? (see graft jobs",
        ),
        (["models", "show", "cats"], "there is no 'show'; did you mean get?"),
        (["jobs", "--state", "runing"], "did you mean running?"),
        (["jobs", "--sate", "running"], "there is no 'running': it must be one of list, get"),
        (
            ["finetune", "x", "--nam=pets"],
            "'--nam' is not an argument of this command; did you mean --name",
        ),
        (["rank", "x", "--tme-budget", "3"], "not an argument of this command; did you mean"),
        (
            ["rank", "x", "--wholly-else", "3"],
            "'--wholly-else' is not an argument of this command (",
        ),
    ],
)
def test_a_mistyped_word_is_one_line_that_says_what_was_meant(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_a_completion_is_made_of_all_commands_and_completes_paths(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def complete(parser: Any, shell: str) -> str:
        [commands] = [a for a in parser._actions if isinstance(a.choices, dict)]
        paths = [a.dest for a in commands.choices["predict"]._actions if hasattr(a, "complete")]
        return f"{shell} {sorted(commands.choices)[:2]} {paths}"

    monkeypatch.setitem(sys.modules, "shtab", types.SimpleNamespace(FILE={}, complete=complete))
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("zsh ['backbones', 'completion'] ['tls_ca', ")
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'graftml[completion]'" in capsys.readouterr().err


def test_jobs_alone_takes_the_options_of_its_list(
    server: FakeGraft, capsys: pytest.CaptureFixture[str]
) -> None:
    with graftml.Client(server.target) as client:
        client.fine_tune(graftml.ServerPath("/x"), "cats")
        client.fine_tune(graftml.ServerPath("/x"), "dogs")
    where = ["--json", "--server", server.target]

    def listed(*arguments: str) -> list[str]:
        assert main([*arguments, *where]) == 0
        return [json.loads(line)["job_id"] for line in capsys.readouterr().out.splitlines()]

    assert listed("jobs", "--model", "cats") == ["job-1"]
    assert listed("jobs", "--model", "cats", "list") == ["job-1"]
    assert listed("jobs", "list", "--model", "dogs") == ["job-2"]
    assert listed("jobs", "--state", "failed") == []
    assert listed("jobs", "--state", "succeeded", "--model", "dogs") == ["job-2"]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    program = "import sys; from graftml_cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=False,
        capture_output=True,
        timeout=600,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_encoding_lacks_is_escaped(encoding: str, tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(b"x")

    def answer(_model: str, _image: Any) -> dict[str, float]:
        return {LABEL: 0.9, "café": 0.1}

    with FakeGraft(predict=answer) as server:
        server.add_model("pets", classes=[LABEL, "café"])
        where = ("predict", "pets", str(image), "--server", server.target)
        told = command(*where, "--json", PYTHONIOENCODING=encoding)
        assert (told.returncode, told.stderr) == (0, b"")
        assert json.loads(told.stdout)["label"] == LABEL
        assert told.stdout.isascii()
        shown = command(*where, PYTHONIOENCODING=encoding)
        assert (shown.returncode, shown.stderr) == (0, b"")
        assert rb"\u65e5\u672c\u8a9e" in shown.stdout


def test_the_command_keeps_grpcs_own_log_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    with FakeGraft() as server:
        done = command("models", "--tls", "--server", server.target)
    assert done.stderr.decode() == (
        f"graft: {server.target} speaks no TLS, and this client does: leave out --tls and "
        "--tls-ca (in Python credentials), or have the server given a certificate\n"
    )
