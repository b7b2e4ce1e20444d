"""What the client costs to whoever imports it."""

import subprocess
import sys
import tomllib
from pathlib import Path

CLIENT = Path(__file__).parents[2] / "clients/python"
HEAVY = ["rich", "numpy", "PIL", "torch", "onnxruntime", "service", "trainer"]


def loaded(program: str) -> str:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys\n{program}\nprint([m for m in {HEAVY} if m in sys.modules])",
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.stdout.strip()


def test_importing_the_client_loads_none_of_what_it_can_work_with() -> None:
    assert loaded("import graftml") == "[]"


def test_the_fake_server_needs_no_more_than_the_client() -> None:
    program = (
        "import graftml, graftml.testing\n"
        "with graftml.testing.FakeGraft() as s, graftml.Client(s.target) as c:\n"
        "    s.add_model('pets'); assert c.predict(b'x', 'pets')[0].label"
    )
    assert loaded(program) == "[]"


def test_the_command_loads_rich_only_where_people_read() -> None:
    program = "import graftml.cli\ngraftml.cli.main(['--version'])"
    assert loaded(program).splitlines()[-1] == "[]"


def test_the_client_depends_on_grpc_and_protobuf_alone() -> None:
    project = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]
    names = {requirement.partition(">=")[0] for requirement in project["dependencies"]}
    assert names == {"grpcio", "protobuf", "googleapis-common-protos", "graftml-stubs"}
