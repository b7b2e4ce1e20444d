"""Self-contained ONNX files of published versions, composed one at a time."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from service.domain import ModelFiles
from service.engine import head as heads
from service.engine.engine import ReadFile


class Exporter:
    """Composes files in a thread of its own. Stops with `close`."""

    def __init__(self, read: ReadFile) -> None:
        self._read = read
        # One thread: each that composed a file would keep the memory that it took.
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="export")

    async def export(self, files: ModelFiles, metadata: dict[str, str]) -> bytes:
        """Returns the ONNX file with its metadata; raises Damaged (MODEL_UNLOADABLE)."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._export, files, metadata)

    def close(self) -> None:
        """Ends the thread; waits for the file that it composes."""
        self._threads.shutdown()

    def _export(self, files: ModelFiles, metadata: dict[str, str]) -> bytes:
        # Imported late: a third of a second and 30 MB that serving does without.
        from service.engine.export import compose  # noqa: PLC0415

        head = heads.load(self._read(files.head_digest, "head"))
        backbone = self._read(files.backbone_digest, "backbone")
        return compose(backbone, head, metadata, files.decoding)
