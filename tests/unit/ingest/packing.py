"""Packs files into archives of every format, as clients and strangers do."""

import io
import tarfile
import zipfile
from collections.abc import Callable

Entries = dict[str, bytes]
FILES: Entries = {"cat/1.png": b"PIC1", "cat/deep/2.png": b"PIC2", "dog/3.png": b"PIC3"}


def tar_of(entries: Entries, mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_gz_of(entries: Entries) -> bytes:
    return tar_of(entries, "w:gz")


def zip_of(entries: Entries, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as container:
        for name, data in entries.items():
            container.writestr(raw_zip_name(name), data)
    return out.getvalue()


def raw_zip_name(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = name  # past the cleaning that ZipInfo does
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


MAKERS: dict[str, Callable[[Entries], bytes]] = {
    "tar": tar_of,
    "tar.gz": tar_gz_of,
    "zip": zip_of,
}
