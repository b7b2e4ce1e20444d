"""The folders of the server that tenants may read, as the access file names them."""

import logging
from pathlib import Path

import pytest

from service.auth import access_file
from service.auth.authenticator import TokenAuthenticator
from service.auth.reload import BadFile
from service.errors import Unauthenticated
from service.ops.metrics import Metrics
from tests.unit.auth.test_authenticator import PREDICT, bearer, entry, failing, reloads, write


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "access.toml"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics({"version": "1"})


def test_a_tenants_folders_lie_within_the_servers(
    file: Path, tmp_path: Path, metrics: Metrics
) -> None:
    inside, outside = tmp_path / "images" / "acme", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
    link = tmp_path / "images" / "link"
    link.symlink_to(outside)
    server_dirs = (tmp_path / "images",)
    write(file, f'[tenants.acme]\nallowed_dirs = ["{inside}"]\n[tenants.zoo]\n')
    authenticator = TokenAuthenticator(file, server_dirs, metrics)
    assert authenticator.allowed_dirs_of("acme") == (inside,)
    assert authenticator.allowed_dirs_of("zoo") == authenticator.allowed_dirs_of("gone") == ()
    for bad in (outside, link, "images/acme", f"{inside}/../../outside", tmp_path / "nowhere"):
        write(file, f'[tenants.acme]\nallowed_dirs = ["{bad}"]\n')
        with pytest.raises(BadFile, match=r"\[tenants.acme\] allowed_dirs names"):
            access_file.read(file, server_dirs)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_a_folder_that_is_not_there_costs_its_tenant_that_folder_and_nobody_anything_else(
    file: Path, tmp_path: Path, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    there, share = tmp_path / "images" / "a", tmp_path / "images" / "share"
    there.mkdir(parents=True)
    tenants = f'[tenants.acme]\nallowed_dirs = ["{there}", "{share}"]\n[tenants.zoo]\n'
    tokens = entry("ci", "acme", "predict"), entry("boss", "zoo", "admin")
    write(file, tenants + "".join(tokens))
    authenticator = TokenAuthenticator(file, (tmp_path,), metrics)
    assert authenticator.allowed_dirs_of("acme") == (there,)
    # A stolen token is taken back all the same.
    write(file, tenants + tokens[0])
    authenticator.poll()
    authenticator.poll()
    with pytest.raises(Unauthenticated):
        authenticator.admit(PREDICT, bearer("boss"))
    (warning,) = warnings(caplog)
    assert f"allowed_dirs names '{share}'" in warning
    # It counts as soon as it is there, without another change of the file.
    assert (reloads(metrics, "ok"), failing(metrics)) == (1, 0)
    share.mkdir()
    authenticator.poll()
    assert authenticator.allowed_dirs_of("acme") == (there, share)
    assert authenticator.admit(PREDICT, bearer("ci")).tenant == "acme"


def test_a_folder_that_two_tenants_read_is_warned_of(
    file: Path, tmp_path: Path, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a/b", "c"):
        (tmp_path / name).mkdir(parents=True)
    content = "".join(
        f'[tenants.{tenant}]\nallowed_dirs = ["{tmp_path}/{folder}"]\n'
        for tenant, folder in (("one", "a"), ("two", "a/b"), ("three", "c"))
    )
    write(file, content)
    authenticator = TokenAuthenticator(file, (tmp_path,), metrics)
    write(file, content + entry("ci", "one", "predict"))
    authenticator.poll()
    (warning,) = warnings(caplog)
    assert f"[tenants.two] and [tenants.one] both read '{tmp_path}/a/b'" in warning
