"""The command's messages: in its own terms, in one line, in every encoding."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import graftml
import pytest
from graftml.cli import _commands, main
from graftml.testing import FakeGraft
from graftml_stubs.v1 import backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2

LABEL = "日本語"


def test_every_call_of_the_service_has_its_command() -> None:
    calls = {
        method.name
        for file in (backbone_pb2, dataset_pb2, fine_tuning_pb2, model_pb2, prediction_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert calls <= set(_commands._COMMANDS)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("ListModels says which there are", "`graft models` says which there are"),
        ("use SetAlias, or RollbackAlias", "use `graft models alias`, or `graft rollback`"),
        ("PredictStreams of Predictors", "PredictStreams of Predictors"),
        ("or set force to delete it", "or use --force to delete it"),
    ],
)
def test_messages_name_commands(message: str, told: str) -> None:
    assert _commands.in_commands(message) == told


def test_an_error_of_the_service_names_a_command(
    server: FakeGraft, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail("GetModel", graftml.NotFound("see ListModels", reason="MODEL_NOT_FOUND"))
    assert main(["models", "get", "pets", "--server", server.target]) == 1
    assert capsys.readouterr().err == "graft: see `graft models` [MODEL_NOT_FOUND]\n"


def test_a_model_that_aliases_name_is_deleted_by_force(
    server: FakeGraft, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add_model("pets", versions=2)
    where = ["--server", server.target]
    assert main(["models", "alias", "pets", "prod", "1", *where]) == 0
    used = graftml.FailedPrecondition(
        "delete prod first, or set force", reason=graftml.Reason.MODEL_IN_USE
    )
    server.fail("DeleteModel", used)
    assert main(["models", "delete", "pets", *where]) == 1
    err = capsys.readouterr().err
    assert "prod" in err
    assert "--force" in err
    assert main(["models", "delete", "pets:2", "--force", *where]) == 2
    assert "--force is for a whole model" in capsys.readouterr().err
    assert main(["models", "delete", "pets", "--force", *where]) == 0
    assert capsys.readouterr().out == "deleted pets\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fintune"], "graft: argument COMMAND: there is no 'fintune'; did you mean finetune?"),
        (
            ["models", "--server", "::1:50051"],
            "'::1:50051' is not an address: write an IPv6 address",
        ),
        (["jobs", "wach"], "graft jobs: argument ACTION: there is no 'wach'; did you mean watch?"),
        (["jobs", "--state", "runing"], "did you mean running?"),
        (["jobs", "--sate", "running"], "there is no 'running': it must be one of list, get"),
        (["rank", "x", "--tme-budget", "3"], "no argument of this command; did you mean"),
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
