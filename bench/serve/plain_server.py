"""The yardstick: a plain hand-written server, grpc.aio and ONNX Runtime's CPU provider.

    python -m bench.serve.plain_server MODEL PORT

No batching, no models, no errors, no metrics: what a good engineer writes in an
hour. Decoding and inference run in two threads with one ONNX Runtime thread
each, which is its best on two cores under load.
"""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from bench.serve.work import plain_decode, session
from service.ops.cpus import available_cores


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
    handlers = {"Predict": grpc.unary_unary_rpc_method_handler(predict)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("plain", handlers)])
    server.add_insecure_port(f"127.0.0.1:{sys.argv[2]}")
    await server.start()
    print("serving", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
