"""Stages what a spec names on the trainer's machine: from digests to files, kept while it works."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec

from service.contract import ExportedBackbone, ImageSource, JobSpec, RankSpec, Spec
from service.storage.blobs import Blobs


@contextmanager
def staged(spec: Spec, blobs: Blobs) -> Iterator[Spec]:
    """Yields a spec with the files that it names by digest, which stay here until the end.

    Blocks while they are fetched. Raises Damaged (MODEL_UNLOADABLE) where an index or a pack is
    missing. Without the others a trainer gets on: it exports a backbone anew, and says what it
    could not compare with.
    """
    needed = {digest for source in _sources(spec) for digest in _files_of(source)}
    useful = _backbones(spec)
    if isinstance(spec, JobSpec):
        useful |= _versions_before(spec)
    wanted = needed | blobs.are_there(useful - needed)
    with blobs.files(wanted, "file that the job works with") as files:
        yield msgspec.structs.replace(spec, files={key: str(path) for key, path in files.items()})


def _sources(spec: JobSpec | RankSpec) -> Iterable[ImageSource]:
    yield spec.data
    if isinstance(spec, JobSpec):
        yield from spec.base_data
        if spec.target is not None:
            yield spec.target


def _files_of(source: ImageSource) -> list[str]:
    return [source.index, *source.packs] if source.index else []


def _backbones(spec: JobSpec | RankSpec) -> set[str]:
    exported: list[ExportedBackbone] = [
        each for backbone in spec.backbones for each in backbone.exported
    ]
    if isinstance(spec, JobSpec):
        exported += spec.exported
    return {each.digest for each in exported}


def _versions_before(spec: JobSpec) -> set[str]:
    before = spec.incumbent
    known = {spec.previous_answers}
    if before is not None:
        known |= {before.backbone_digest, before.head_digest, before.answers_digest}
    return known - {""}
