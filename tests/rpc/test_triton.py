"""Triton's own Python client against a real server, in a process and an environment of its own."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from service.rpc.open_inference import grpc_predict_v2_pb2
from tests.rpc.conftest import Service, image
from tests.rpc.triton_descriptors import described

HERE = Path(__file__).parent
DOC = HERE.parents[1] / "docs/reference/open_inference.md"
GUARD_S = 600.0
"""Ends a process that hangs."""
PYTHON = HERE.parents[1] / ".venv/triton/bin/python"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no environment with tritonclient: `make test` makes .venv/triton"
)


async def run(*arguments: str | Path) -> str:
    """What a program printed that ran with Triton's client."""
    process = await asyncio.create_subprocess_exec(
        PYTHON, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(GUARD_S):
            out, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, errors.decode()
    return out.decode()


def write_images(folder: Path) -> None:
    for colour in ("red", "blue"):
        (folder / f"{colour}.png").write_bytes(image(colour))


async def test_what_is_on_the_wire_is_tritons() -> None:
    theirs = json.loads(await run(HERE / "triton_descriptors.py"))
    ours = described([grpc_predict_v2_pb2.DESCRIPTOR])
    assert len(ours) > 150
    assert {name: what for name, what in ours.items() if theirs.get(name) != what} == {}


async def test_tritons_client_works_unchanged(service: Service, tmp_path: Path) -> None:
    await service.make_model()
    write_images(tmp_path)
    target = f"127.0.0.1:{service.app.port}"
    found: dict[str, Any] = json.loads(await run(HERE / "triton_client.py", target, tmp_path))

    assert (found["live"], found["ready"], found["server"]) == (True, True, "graft")
    assert found["model_ready"] == [True, False]
    assert found["metadata"]["inputs"][0]["name"] == "images"
    assert found["config"]["max_batch_size"] == 256

    assert found["id"] == "r1"
    assert [len(row) for row in found["probabilities"]] == [3, 3]
    assert found["probabilities"][0][2] > 0.9
    both = ["red", "blue"]
    assert found["labels"] == {"BYTES 1": both, "BYTES 2": both, "UINT8 4": both, "FP32 4": both}
    assert [row[0].split(":")[1:] for row in found["classes"]] == [["2", "red"], ["0", "blue"]]
    assert [len(row) for row in found["classes"]] == [2, 2]
    assert found["features"] == [pytest.approx([1, 0, 0]), pytest.approx([0, 0, 1])]
    assert found["async"] == [both, None]

    assert found["stream"] == {str(number): both for number in range(5)}
    assert len(found["stream_errors"]) == 1
    assert "nobody" in found["stream_errors"][0]

    assert found["index"] == [
        {"name": "colours", "version": "1", "state": "READY", "reason": "in memory"}
    ]
    unknown, damaged, undescribed, untraced = found["errors"]
    assert unknown[0] == undescribed[0] == "StatusCode.NOT_FOUND"
    assert "nobody" in unknown[1]
    assert damaged[0] == "StatusCode.INVALID_ARGUMENT"
    assert "image 0" in damaged[1]
    assert untraced[0] == "StatusCode.UNIMPLEMENTED"
    # 1 + 4 + 1 + 1 + 5 calls of two images.
    assert int(found["statistics"]["execution_count"]) == 12
    assert int(found["statistics"]["inference_count"]) == 24
    assert int(found["statistics"]["inference_stats"]["success"]["ns"]) > 0


async def test_the_example_in_the_documentation_runs(service: Service, tmp_path: Path) -> None:
    await service.make_model("pets")
    write_images(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert "localhost:50051" in example
    example = example.replace("localhost:50051", f"127.0.0.1:{service.app.port}")
    program = tmp_path / "example.py"
    program.write_text(example.replace('"cat.jpg"', repr(str(tmp_path / "red.png"))))
    printed = await run(program)
    assert "red" in printed
    assert re.search(r"^\d\.\d{6}:2:red$", printed, re.MULTILINE)
