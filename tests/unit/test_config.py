"""Settings from flags and the environment, and what is said of bad ones."""

from pathlib import Path

import pytest

from service import config
from service.config import BadConfig, Config


def test_without_settings_the_defaults_hold() -> None:
    assert config.load([], {}) == Config()


def test_the_environment_sets_and_a_flag_wins() -> None:
    environment = {"GRAFT_PORT": "1", "GRAFT_MAX_BATCH": "4", "OTHER": "x"}
    loaded = config.load(["--port", "2"], environment)
    assert (loaded.port, loaded.max_batch) == (2, 4)


def test_the_clients_variables_are_not_taken_for_settings() -> None:
    assert config.load([], {"GRAFT_SERVER": "a:1", "GRAFT_TOKEN": "t"}) == Config()


def test_folders_are_split_resolved_and_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    loaded = config.load([f"--allowed-dirs={tmp_path}/a:{tmp_path}/link"], {})
    assert loaded.allowed_dirs == (tmp_path / "a", tmp_path / "a")
    with pytest.raises(BadConfig, match=r"GRAFT_ALLOWED_DIRS.*missing"):
        config.load([], {"GRAFT_ALLOWED_DIRS": f"{tmp_path}/missing"})


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"GRAFT_PROT": "1"}, "GRAFT_PROT, which is no setting; did you mean GRAFT_PORT?"),
        ({"GRAFT_XYZZY": "1"}, "see --help"),
        ({"GRAFT_PORT": "x"}, "GRAFT_PORT is 'x'; it must be a whole number"),
        ({"GRAFT_PORT": "70000"}, "from 0 to 65535"),
        ({"GRAFT_DRAIN_S": "nan"}, "GRAFT_DRAIN_S is nan; it must be at least 0"),
        ({"GRAFT_LOG_FORMAT": "xml"}, "one of json, console"),
        ({"GRAFT_DEFAULT_BACKBONE": "vgg"}, "one of resnet18"),
        ({"GRAFT_HOST": ""}, "GRAFT_HOST is empty"),
    ],
)
def test_a_bad_key_or_value_is_named(environment: dict[str, str], says: str) -> None:
    with pytest.raises(BadConfig, match=says.replace("?", r"\?")):
        config.load([], environment)


def test_a_call_that_no_queue_could_hold_is_a_bad_setting() -> None:
    with pytest.raises(BadConfig, match="--max-pictures is 256, more than --max-queue, 100"):
        config.load(["--max-queue", "100"], {})


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.load(["--help"], {})
    text = capsys.readouterr().out
    for name in Config.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in text


def test_the_readme_has_the_table_as_it_is() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    assert config.table() in readme.read_text()
