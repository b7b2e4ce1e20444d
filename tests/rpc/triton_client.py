"""What Triton's own client sees of a server; run with a Python that has tritonclient[grpc].

    python triton_client.py HOST:PORT FOLDER

FOLDER holds red.png and blue.png; the server has a model `colours`. Prints one
JSON object. A program of its own, since tritonclient and this project need
different releases of protobuf.
"""

import json
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

GUARD_S = 300.0


def main(target: str, folder: Path) -> None:
    client = triton.InferenceServerClient(target)
    files = [(folder / f"{name}.png").read_bytes() for name in ("red", "blue")]
    encoded = np.array(files, dtype=np.object_)
    pixels = np.zeros((2, 6, 8, 3), np.uint8)
    pixels[0, ..., 0] = pixels[1, ..., 2] = 255
    found: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "server": client.get_server_metadata(as_json=True)["name"],
        "model_ready": [client.is_model_ready(name) for name in ("colours", "nobody")],
        "metadata": client.get_model_metadata("colours", as_json=True),
        "config": client.get_model_config("colours", as_json=True)["config"],
    }

    def tensor(array: Any, datatype: str) -> Any:
        made = triton.InferInput("images", array.shape, datatype)
        made.set_data_from_numpy(array)
        return made

    answer = client.infer("colours", [tensor(encoded, "BYTES")], request_id="r1")
    found["id"] = answer.get_response().id
    found["probabilities"] = answer.as_numpy("probabilities").tolist()
    found["labels"] = {}
    for array, datatype in (
        (encoded, "BYTES"),
        (encoded.reshape(2, 1), "BYTES"),
        (pixels, "UINT8"),
        ((pixels / 255).astype(np.float32), "FP32"),
    ):
        answer = client.infer("colours", [tensor(array, datatype)], timeout=600_000_000)
        found["labels"][f"{datatype} {array.ndim}"] = texts(answer.as_numpy("labels"))

    images = [tensor(encoded, "BYTES")]
    asked = [
        triton.InferRequestedOutput("probabilities", class_count=2),
        triton.InferRequestedOutput("features"),
    ]
    answer = client.infer("colours", images, model_version="1", outputs=asked)
    found["classes"] = [texts(row) for row in answer.as_numpy("probabilities")]
    found["features"] = answer.as_numpy("features").tolist()

    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.async_infer("colours", images, callback=lambda result, error: done.put((result, error)))
    result, error = done.get(timeout=GUARD_S)
    found["async"] = [texts(result.as_numpy("labels")), error]

    streamed = {}
    client.start_stream(callback=lambda result, error: done.put((result, error)))
    for number in range(5):
        client.async_stream_infer("colours", images, request_id=str(number))
    client.async_stream_infer("nobody", images, request_id="5")
    errors = []
    for _ in range(6):
        result, error = done.get(timeout=GUARD_S)
        if error is not None:
            errors.append(str(error))
        else:
            streamed[result.get_response().id] = texts(result.as_numpy("labels"))
    client.stop_stream()
    found["stream"] = streamed
    found["stream_errors"] = errors

    client.unload_model("colours")
    client.load_model("colours")
    found["index"] = client.get_model_repository_index(as_json=True)["models"]
    (found["statistics"],) = client.get_inference_statistics("colours", as_json=True)["model_stats"]
    found["errors"] = [
        failure(client.infer, "nobody", images),
        failure(client.infer, "colours", [tensor(np.array([b"x"], dtype=np.object_), "BYTES")]),
        failure(client.get_model_metadata, "nobody"),
        failure(client.get_trace_settings),
    ]
    client.close()
    print(json.dumps(found))


def texts(array: Any) -> list[str]:
    return [element.decode() for element in array.ravel()]


def failure(call: Any, *arguments: Any) -> list[str]:
    """The status and the message of a call that must fail."""
    try:
        call(*arguments)
    except triton.InferenceServerException as error:
        return [str(error.status()), str(error.message())]
    raise AssertionError("the call did not fail")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
