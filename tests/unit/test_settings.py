"""Settings from flags, the environment and a file, and what is said of bad ones."""

import re
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from service import app, settings
from service.__main__ import command_line
from service.config import BadConfig, Config
from service.engine.gpu import GpuLimits
from service.engine.providers import Provider, ProviderName
from service.engine.runtime import OnnxRuntime
from service.ops.metrics import Metrics


def load(flags: Sequence[str], environment: Mapping[str, str]) -> Config:
    return settings.load(vars(command_line().parse_args(["run", *flags])), environment)


def test_without_settings_the_defaults_hold() -> None:
    assert load([], {}) == Config()


def test_the_environment_sets_and_a_flag_wins() -> None:
    environment = {"GRAFT_PORT": "1", "GRAFT_MAX_BATCH": "4", "OTHER": "x"}
    loaded = load(["--port", "2"], environment)
    assert (loaded.port, loaded.max_batch) == (2, 4)


def test_a_flag_wins_over_a_variable_and_both_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "graft.toml"
    file.write_text("port = 1\nmetrics_port = 1\nmax_batch = 1\n")
    environment = {"GRAFT_METRICS_PORT": "2", "GRAFT_MAX_BATCH": "2"}
    for flags, named in ([f"--config={file}"], {}), ([], {"GRAFT_CONFIG": str(file)}):
        loaded = load([*flags, "--max-batch=3"], {**environment, **named})
        assert (loaded.port, loaded.metrics_port, loaded.max_batch) == (1, 2, 3)
        assert loaded.max_queue == Config().max_queue


def test_of_two_files_that_of_the_flag_counts(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("port = 1\n")
    loaded = load([f"--config={tmp_path}/a.toml"], {"GRAFT_CONFIG": "/no/such/file"})
    assert loaded.port == 1


def test_a_file_can_say_all_that_flags_can(tmp_path: Path) -> None:
    file = tmp_path / "graft.toml"
    file.write_text(
        f'host = "::1"\ndata_dir = "{tmp_path}/data"\nallowed_dirs = ["{tmp_path}/a:b"]\n'
        'drain_s = 5\nload_timeout_s = 0.5\nlog_format = "console"\n'
        'pass_environment = ["HTTP_PROXY", "MY_*"]\n'
    )
    (tmp_path / "a:b").mkdir()
    assert load([f"--config={file}"], {}) == Config(
        host="::1",
        data_dir=tmp_path / "data",
        allowed_dirs=(tmp_path / "a:b",),
        drain_s=5.0,
        load_timeout_s=0.5,
        log_format="console",
        pass_environment="HTTP_PROXY,MY_*",
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("prot = 1", "holds prot, which is not a setting; did you mean port?"),
        ("foo = 1", "holds foo, which is not a setting; `graft-server run --help`"),
        ("[server]\nport = 1", "holds the table [server]: settings stand at top level"),
        ('port = "1"', ": port is '1'; it must be a whole number"),
        ("port = 1.0", ": port is 1.0; it must be a whole number"),
        ("port = true", ": port is true; it must be a whole number"),
        ("port = 70000", ": port is 70000; it must be from 0 to 65535"),
        ("drain_s = nan", ": drain_s is nan; it must be at least 0"),
        ("accept_gzip = true", ": accept_gzip is true; it must be one of no, yes, in quotes"),
        ('log_format = "xml"', ": log_format is 'xml'; it must be one of json, console"),
        ("data_dir = 1", ": data_dir is 1; it must be a text in quotes"),
        ('allowed_dirs = "/tmp"', ": allowed_dirs is '/tmp'; it must be an array of texts"),
        ("allowed_dirs = [1]", ": allowed_dirs is [1]; it must be an array of texts"),
        (
            'allowed_dirs = ["/no/such"]',
            ": allowed_dirs names '/no/such', which is not a folder here",
        ),
        ("port = ", "is not TOML: "),
    ],
)
def test_a_bad_key_or_value_of_a_file_is_named_with_the_file(
    content: str, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "graft.toml"
    file.write_text(content)
    with pytest.raises(BadConfig, match=re.escape(says)) as caught:
        load([], {"GRAFT_CONFIG": str(file)})
    assert str(caught.value).startswith(str(file))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="--config names '/no/such', which cannot be read: No such"):
        load(["--config=/no/such"], {})
    with pytest.raises(BadConfig, match="GRAFT_CONFIG names"):
        load([], {"GRAFT_CONFIG": str(tmp_path)})


def test_flags_may_not_be_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(["--max-im=2"], {})
    assert "unrecognized arguments: --max-im=2" in capsys.readouterr().err


def test_the_clients_variables_are_not_taken_for_settings() -> None:
    assert load([], {"GRAFT_SERVER": "a:1", "GRAFT_TOKEN": "t"}) == Config()


def test_folders_are_split_resolved_and_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    loaded = load([f"--allowed-dirs={tmp_path}/a:{tmp_path}/link"], {})
    assert loaded.allowed_dirs == (tmp_path / "a", tmp_path / "a")
    with pytest.raises(BadConfig, match=r"GRAFT_ALLOWED_DIRS.*missing"):
        load([], {"GRAFT_ALLOWED_DIRS": f"{tmp_path}/missing"})


@pytest.mark.parametrize("folder", ["data", "data/datasets", ".", "link"])
def test_folders_for_images_that_overlap_the_data_folder_are_refused(
    tmp_path: Path, folder: str
) -> None:
    (tmp_path / "data" / "datasets").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    data = f"--data-dir={tmp_path}/data"
    with pytest.raises(BadConfig, match="which overlaps --data-dir"):
        load([data, f"--allowed-dirs={tmp_path}/images:{tmp_path}/{folder}"], {})
    weights = f"--weights-dir={tmp_path}/data/weights"
    loaded = load([data, weights, f"--allowed-dirs={tmp_path}/images"], {})
    assert loaded.allowed_dirs == (tmp_path / "images",)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"GRAFT_PROT": "1"}, "GRAFT_PROT, which is not a setting; did you mean GRAFT_PORT?"),
        # Nothing is like it, but for the beginning that all have.
        ({"GRAFT_FOO": "1"}, "GRAFT_FOO, which is not a setting; `graft-server run --help`"),
        ({"GRAFT_XYZZY": "1"}, "`graft-server run --help` lists all"),
        ({"GRAFT_PORT": "x"}, "GRAFT_PORT is 'x'; it must be a whole number"),
        ({"GRAFT_PORT": "70000"}, "from 0 to 65535"),
        ({"GRAFT_DRAIN_S": "nan"}, "GRAFT_DRAIN_S is nan; it must be at least 0"),
        ({"GRAFT_LOG_FORMAT": "xml"}, "one of json, console"),
        ({"GRAFT_DEFAULT_BACKBONE": "vgg"}, "one of efficientnet_lite0"),
        ({"GRAFT_HOST": ""}, "GRAFT_HOST is empty"),
    ],
)
def test_a_bad_key_or_value_is_named(environment: dict[str, str], says: str) -> None:
    with pytest.raises(BadConfig, match=says.replace("?", r"\?")):
        load([], environment)


def test_a_call_that_no_queue_could_hold_is_a_bad_setting() -> None:
    with pytest.raises(BadConfig, match="--max-images is 256, more than --max-queue, 100"):
        load(["--max-queue", "100"], {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "graft.example", "127.1", "fe80::1"])
def test_beyond_this_machine_somebody_must_say_who_may_call(host: str) -> None:
    with pytest.raises(BadConfig, match=r"other machines may reach.*--access-file.*tokens create"):
        load(["--host", host], {})
    for flags in (
        ["--access-file=access.toml"],
        ["--allow-unauthenticated=yes"],
        ["--tls-cert-file=a", "--tls-key-file=b", "--tls-client-ca-file=c"],
    ):
        assert load(["--host", host, *flags], {}).host == host
    # TLS alone hides what is said, and lets everybody say it.
    with pytest.raises(BadConfig, match="--access-file"):
        load(["--host", host, "--tls-cert-file=a", "--tls-key-file=b"], {})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_on_this_machine_alone_nobody_needs_to(host: str) -> None:
    assert load(["--host", host], {}).host == host


def test_an_ipv6_address_gets_its_brackets() -> None:
    assert Config(host="::1", port=5).address == Config(host="[::1]", port=5).address == "[::1]:5"
    assert Config(host="localhost", port=5).address == "localhost:5"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tls-cert-file=a"], "--tls-cert-file is set and --tls-key-file is not"),
        (["--tls-key-file=a"], "--tls-key-file is set and --tls-cert-file is not"),
        (["--tls-client-ca-file=a"], "--tls-client-ca-file is set without --tls-cert-file"),
    ],
)
def test_half_of_what_tls_needs_is_a_bad_setting(flags: list[str], says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        load(flags, {})


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(["--help"], {})
    text = capsys.readouterr().out
    assert "--config" in text
    for name in Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text


@pytest.mark.parametrize(
    ("flags", "provider", "largest_run", "arena_bytes"),
    [
        ([], "cuda", 128, 0),
        (["--gpu-mem-limit-mb=512", "--max-batch=16"], "cuda", 16, 512 * 2**20),
        ([], "cpu", 32, 0),
    ],
)
async def test_what_a_backbone_may_take_of_a_gpu_is_set(
    flags: list[str],
    provider: ProviderName,
    largest_run: int,
    arena_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "choose_provider", lambda _: Provider(provider, "for the test"))
    async with AsyncExitStack() as stack:
        given, metrics = load(flags, {}), Metrics({"version": "test"})
        runtime = app._choose_runtime(given, 1, metrics, {}, stack)
    assert isinstance(runtime, OnnxRuntime)
    assert runtime._gpu == GpuLimits(largest_run, arena_bytes)
    assert runtime._max_batch == largest_run


@pytest.mark.parametrize("flag", ["--gpu-mem-limit-mb=-1", "--gpu-mem-limit-mb=lots"])
def test_a_limit_of_memory_that_is_none_is_refused(flag: str) -> None:
    with pytest.raises(BadConfig, match=r"(?i)gpu.mem.limit.mb"):
        load([flag], {})
