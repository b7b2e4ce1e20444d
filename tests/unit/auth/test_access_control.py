"""Access control as the configuration sets it, and its warnings."""

import logging
from pathlib import Path

import pytest

from service.auth.access_control import AccessControl
from service.auth.authenticator import Authenticator
from service.config import BadConfig, Config
from service.ops.metrics import Metrics
from tests.certificates import Authority


@pytest.fixture
def metrics() -> Metrics:
    return Metrics({"version": "1"})


@pytest.fixture
def access_file(tmp_path: Path) -> Path:
    (tmp_path / "images" / "acme").mkdir(parents=True)
    path = tmp_path / "access.toml"
    path.write_text(f'[tenants.acme]\nallowed_dirs = ["{tmp_path}/images/acme"]\nstored_mb = 2\n')
    path.chmod(0o600)
    return path


def test_without_an_access_file_the_servers_folders_are_the_default_tenants(
    metrics: Metrics, tmp_path: Path
) -> None:
    access = AccessControl(Config(allowed_dirs=(tmp_path,)), metrics)
    assert type(access.authenticator) is Authenticator
    assert access.credentials is None
    assert access.allowed_dirs_of("default") == (tmp_path,)
    assert access.allowed_dirs_of("acme") == ()
    assert access.max_stored_bytes_of("default") is None


def test_with_an_access_file_each_tenant_has_its_own_folders_and_bounds(
    metrics: Metrics, access_file: Path, tmp_path: Path
) -> None:
    config = Config(access_file=access_file, allowed_dirs=(tmp_path / "images",))
    access = AccessControl(config, metrics)
    assert access.needs_tokens
    assert access.allowed_dirs_of("acme") == (tmp_path / "images" / "acme",)
    assert access.allowed_dirs_of("default") == ()
    assert access.max_stored_bytes_of("acme") == 2 * 2**20


def test_a_tenants_folder_outside_the_servers_is_a_bad_setting(
    metrics: Metrics, access_file: Path
) -> None:
    with pytest.raises(BadConfig, match="GRAFT_ALLOWED_DIRS"):
        AccessControl(Config(access_file=access_file), metrics)


@pytest.mark.parametrize(
    ("host", "has_tls", "is_warned"),
    [("0.0.0.0", False, True), ("127.0.0.1", False, False), ("0.0.0.0", True, False)],
)
def test_tokens_that_reach_the_server_unencrypted_are_warned_of(
    metrics: Metrics,
    access_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    host: str,
    has_tls: bool,
    is_warned: bool,
) -> None:
    tls = {}
    if has_tls:
        cert, key = Authority().sign().write(tmp_path, "server")
        tls = {"tls_cert_file": cert, "tls_key_file": key}
    dirs = (tmp_path / "images",)
    access = AccessControl(
        Config(host=host, access_file=access_file, allowed_dirs=dirs, **tls), metrics
    )
    assert (access.credentials is not None) == has_tls
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert ["unencrypted" in r.getMessage() for r in warned] == [True] * is_warned
