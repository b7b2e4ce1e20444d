"""The yardstick: a plain hand-written server, grpc.aio and ONNX Runtime's CPU provider.

    python -m bench.serve.plain_server MODEL

No batching, no models, no errors, no metrics: what a good engineer writes in an
hour. Decoding and inference run in a thread a core with one ONNX Runtime thread
each, which is its best under load. Prints its port.
"""

import asyncio
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from PIL import Image

from service.engine import providers
from service.ops.cpus import available_cores

Pixels = npt.NDArray[np.uint8]


async def main() -> None:
    """Serves until it is killed."""
    cores = available_cores()
    own = session(Path(sys.argv[1]), 1)
    name = own.get_inputs()[0].name
    pool = ThreadPoolExecutor(cores)

    def work(data: bytes) -> bytes:
        (answer,) = own.run(None, {name: plain_decode(data)[None]})
        return str(int(answer[0].argmax())).encode()

    async def predict(data: bytes, _context: object) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(pool, work, data)

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    handlers: dict[str, Any] = {"Predict": grpc.unary_unary_rpc_method_handler(predict)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("plain", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def plain_decode(data: bytes) -> Pixels:
    """Shorter side to 256, the middle 224 x 224, in two steps as everybody writes it."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    return np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.uint8)


def session(model: Path, threads: int) -> ort.InferenceSession:
    """ONNX Runtime's CPU provider as it comes, but for the threads and exact sums in int8."""
    options = ort.SessionOptions()
    if not providers.has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    asyncio.run(main())
