"""Two tenants on one server with TLS and tokens, from the first token to a revoked one."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import graftml
import grpc
import pytest

from tests.certificates import Authority
from tests.e2e.conftest import GUARD_S, INSTANT, ServiceProcess, StartService

pytestmark = pytest.mark.e2e

GRAFT = "import sys; from graftml.cli import main; sys.exit(main())"


def make_token(file: Path, name: str, tenant: str, *roles: str) -> str:
    """As an operator does; returns the token."""
    flags = [f"--tenant={tenant}", f"--id={name}", f"--access-file={file}"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "service",
            "tokens",
            "create",
            *flags,
            *(f"--role={role}" for role in roles),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
    )
    return done.stdout.strip()


def refused(call: Callable[[], object]) -> graftml.GraftError:
    with pytest.raises(graftml.GraftError) as caught:
        call()
    return caught.value


class Door:
    """How to get to the server: its address, its authority, the tokens."""

    def __init__(self, service: ServiceProcess, authority: Path) -> None:
        self._address, self._authority = service.address, authority

    def client(self, token: str) -> graftml.Client:
        trusted = grpc.ssl_channel_credentials(self._authority.read_bytes())
        return graftml.Client(
            self._address,
            credentials=trusted,
            token=token,
            timeout_s=GUARD_S,
            retry=graftml.NO_RETRY,
        )

    def command(self, token: str, *arguments: object) -> list[dict[str, object]]:
        """What the `graft` command tells programs."""
        done = subprocess.run(
            [
                *(sys.executable, "-c", GRAFT, "--json", f"--server={self._address}"),
                *(f"--tls-ca={self._authority}", *map(str, arguments)),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            env={**os.environ, "GRAFT_TOKEN": token},
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


def test_two_tenants_share_a_server_and_see_nothing_of_each_other(
    start_service: StartService, digits: Path, tmp_path: Path
) -> None:
    access, authority = tmp_path / "access.toml", Authority()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    cert, key = authority.sign().write(tmp_path, "server")
    tokens = {
        "acme": make_token(access, "acme-lab", "acme", "train", "predict"),
        "asks": make_token(access, "acme-web", "acme", "predict"),
        "zoo": make_token(access, "zoo-lab", "zoo", "admin"),
    }
    service = start_service(
        f"--access-file={access}",
        f"--tls-cert-file={cert}",
        f"--tls-key-file={key}",
        module=INSTANT,
    )
    door = Door(service, tmp_path / "ca.pem")
    # Each tenant has classes of its own.
    four, two = tmp_path / "four", tmp_path / "two"
    for folder, labels in ((four, "0123"), (two, "01")):
        for label in labels:
            (folder / label).mkdir(parents=True)
            for file in sorted((digits / label).iterdir())[:8]:
                shutil.copy(file, folder / label)

    with (
        door.client(tokens["acme"]) as acme,
        door.client(tokens["asks"]) as asks,
        door.client(tokens["zoo"]) as zoo,
        door.client("") as nobody,
    ):
        nobody.wait_ready(timeout_s=GUARD_S)  # health needs no token
        ours = acme.fine_tune(four, name="digits")
        theirs = door.command(tokens["zoo"], "finetune", two, "--name", "digits")
        ours.wait(timeout_s=GUARD_S)
        their_job = str(theirs[0]["job_id"])

        # One name, two models, each with its own classes, numbered from 1.
        assert acme.get_version("digits").classes == ("0", "1", "2", "3")
        assert zoo.get_version("digits").classes == ("0", "1")
        for tenant in (acme, zoo):
            assert [model.name for model in tenant.list_models()] == ["digits"]
            assert [v.version for v in tenant.list_versions("digits")] == [1]
        image = next((four / "3").iterdir())
        assert {s.label for s in zoo.predict(image, "digits", top_k=9)[0].scores} == {"0", "1"}
        assert asks.predict(image, "digits")[0].label in {"0", "1", "2", "3"}

        # Neither sees the other's jobs and datasets, and cannot tell them from none.
        assert [job.job_id for job in acme.list_jobs()] == [ours.job_id]
        assert [job.job_id for job in zoo.list_jobs()] == [their_job]
        (our_data,), (their_data,) = acme.list_datasets(), zoo.list_datasets()
        again = zoo.upload_dataset(four)
        assert again.dataset_id not in {our_data.dataset_id, their_data.dataset_id}
        for mine, other, unknown in (
            (acme.get_job, their_job, "job-unknown"),
            (acme.cancel_job, their_job, "job-unknown"),
            (lambda x: list(acme.watch_job(x)), their_job, "job-unknown"),
            (acme.get_dataset, their_data.dataset_id, "ds-unknown"),
            (lambda x: acme.fine_tune(x, name="stolen"), their_data.dataset_id, "ds-unknown"),
            (zoo.delete_dataset, our_data.dataset_id, "ds-unknown"),
        ):
            answer, plain = (
                refused(lambda m=mine, o=other: m(o)),
                refused(lambda m=mine, u=unknown: m(u)),
            )
            assert (answer.code, answer.reason) == (plain.code, plain.reason)
            assert answer.message.replace(other, "") == plain.message.replace(unknown, "")

        # A token does what its roles say.
        for call in (lambda: asks.fine_tune(our_data, name="more"), asks.list_jobs):
            assert refused(lambda c=call: list(c())).reason == graftml.Reason.ROLE_MISSING
        assert refused(lambda: acme.delete_model("digits")).reason == graftml.Reason.ROLE_MISSING
        assert refused(lambda: nobody.get_model("digits")).reason == graftml.Reason.TOKEN_MISSING
        with graftml.Client(
            service.address, token=tokens["zoo"], timeout_s=GUARD_S, retry=graftml.NO_RETRY
        ) as plain:
            assert isinstance(refused(lambda: plain.get_model("digits")), graftml.CannotConnect)

        # The operator revokes a token, and it is worth nothing.
        revoke = ["tokens", "revoke", "zoo-lab", f"--access-file={access}"]
        subprocess.run([sys.executable, "-m", "service", *revoke], check=True, timeout=GUARD_S)
        deadline = time.monotonic() + GUARD_S
        reason = ""
        while not reason and time.monotonic() < deadline:
            try:
                zoo.get_model("digits")
            except graftml.NotAllowed as error:
                reason = error.reason
        assert reason == graftml.Reason.TOKEN_UNKNOWN
        assert acme.get_model("digits").version_count == 1

    metrics = service.metrics()
    assert 'graft_refused_calls_total{reason="TOKEN_UNKNOWN"} ' in metrics
    assert 'model="acme/digits"' in metrics
    assert service.end() == 0
    # All of it is log lines: nothing writes past the log, whoever knocks.
    lines = [json.loads(line) for line in service.seen]
    changes = [line for line in lines if line["logger"] == "audit"]
    assert {(c["principal"], c["tenant"]) for c in changes if c["message"] == "change"} == {
        ("acme-lab", "acme"),
        ("zoo-lab", "zoo"),
    }
    for token in tokens.values():
        assert token.split("_", 2)[2] not in metrics + "".join(service.seen)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host=0.0.0.0"], "Set --access-file to a file of tokens"),
        (["--access-file=missing.toml"], "missing.toml cannot be read: No such file"),
    ],
)
def test_a_door_that_cannot_be_kept_is_not_opened(
    tmp_path: Path, flags: list[str], says: str
) -> None:
    own = {k: v for k, v in os.environ.items() if not k.startswith("GRAFT_")}
    ended = subprocess.run(
        [sys.executable, "-m", "service", "run", "--port=0", f"--data-dir={tmp_path}/data", *flags],
        check=False,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        env=own,
    )
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "data").exists()
