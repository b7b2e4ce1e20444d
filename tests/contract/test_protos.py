"""The contract is documented, and the code's words are the contract's."""

from importlib.resources import files
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from google.rpc import status_pb2
from graft.v1 import error_reason_pb2, fine_tuning_pb2
from grpc_tools import protoc

from service.domain import JobState
from service.errors import Reason

PROTO = Path(__file__).parents[2] / "proto"


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> descriptor_pb2.FileDescriptorSet:
    out = tmp_path_factory.mktemp("described") / "set"
    arguments = [
        "protoc",
        f"-I{PROTO}",
        f"-I{Path(status_pb2.__file__).parents[2]}",
        f"-I{files('grpc_tools') / '_proto'}",
        "--include_source_info",
        f"--descriptor_set_out={out}",
        *(str(path) for path in sorted(PROTO.rglob("*.proto"))),
    ]
    assert protoc.main(arguments) == 0
    return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())


def test_everything_in_the_contract_is_documented(
    described: descriptor_pb2.FileDescriptorSet,
) -> None:
    bare = []
    for file in described.file:
        # Odd places in a path are field numbers: messages 4, enums 5, services 6, fields 2,
        # values 2, methods 2, nested types 3; oneofs (8) speak through their fields.
        for location in file.source_code_info.location:
            path = list(location.path)
            kinds = path[::2]
            is_thing = len(path) % 2 == 0 and kinds and kinds[0] in (4, 5, 6)
            if not is_thing or any(kind not in (2, 3, 4, 8) for kind in kinds[1:]):
                continue
            if not location.leading_comments.strip():
                bare.append((file.name, path))
    assert not bare


def test_the_services_reasons_are_the_contracts() -> None:
    prefix = "ERROR_REASON_"
    names = {name.removeprefix(prefix) for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert {reason.value for reason in Reason} == names - {"UNSPECIFIED"}


def test_the_services_job_states_are_the_contracts() -> None:
    names = {n.removeprefix("JOB_STATE_") for n in fine_tuning_pb2.JobState.keys()}  # noqa: SIM118
    assert {state.value for state in JobState} == names - {"UNSPECIFIED"}
