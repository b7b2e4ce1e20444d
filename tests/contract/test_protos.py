"""The contract is documented, and the code's words are the contract's."""

import re
from importlib.resources import files
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import status_pb2
from graftml import errors
from graftml_stubs.v1 import error_reason_pb2, fine_tuning_pb2
from grpc_tools import protoc

from service.domain import JobState
from service.errors import KINDS, GraftError, Reason

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"


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
        # values 2, methods 2 (options 4), nested types 3; oneofs (8) speak through their fields.
        for location in file.source_code_info.location:
            path = list(location.path)
            kinds = path[::2]
            is_thing = len(path) % 2 == 0 and kinds and kinds[0] in (4, 5, 6)
            is_option = kinds == [6, 2, 4]
            if not is_thing or is_option or any(kind not in (2, 3, 4, 8) for kind in kinds[1:]):
                continue
            if not location.leading_comments.strip():
                bare.append((file.name, path))
    assert not bare


def test_the_services_reasons_are_the_contracts() -> None:
    prefix = "ERROR_REASON_"
    names = {name.removeprefix(prefix) for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118
    assert {reason.value for reason in Reason} == names - {"UNSPECIFIED"}


def test_every_reason_has_a_kind_and_is_documented_with_the_code_of_that_kind(
    described: descriptor_pb2.FileDescriptorSet,
) -> None:
    assert KINDS.keys() == set(Reason)
    (file,) = [file for file in described.file if file.name == "graft/v1/error_reason.proto"]
    (reasons,) = file.enum_type
    # 5: enums, 2: values.
    comments = {
        reasons.value[location.path[3]].name: " ".join(location.leading_comments.split())
        for location in file.source_code_info.location
        if list(location.path[:3]) == [5, 0, 2] and len(location.path) == 4
    }
    for reason, kind in KINDS.items():
        codes = re.findall(r"\(([A-Z_]{5,})[);]", comments[f"ERROR_REASON_{reason}"])
        assert codes == [kind.code], reason


def test_every_kind_has_a_class_of_the_clients_and_the_two_who_name_nobody_share_one() -> None:
    classes = {code: errors.KINDS[grpc.StatusCode[code]] for code in _codes()}
    assert errors.GraftError not in classes.values()
    assert classes.pop("UNAUTHENTICATED") is classes["PERMISSION_DENIED"]
    assert len(set(classes.values())) == len(classes)


def _codes() -> set[str]:
    return {kind.code for kind in KINDS.values()}


def test_an_error_is_raised_as_the_kind_to_which_its_reason_belongs() -> None:
    raised = re.compile(r"\b([A-Z]\w+)\(\s*Reason\.([A-Z_]+)")
    kinds = {kind.__name__ for kind in (GraftError, *GraftError.__subclasses__())}
    count = 0
    for file in [*ROOT.glob("service/**/*.py"), *ROOT.glob("trainer/**/*.py")]:
        for name, reason in raised.findall(file.read_text()):
            if name in kinds:
                assert name == KINDS[Reason[reason]].__name__, (file, reason)
                count += 1
    assert count > 100


def test_the_services_job_states_are_the_contracts() -> None:
    names = {n.removeprefix("JOB_STATE_") for n in fine_tuning_pb2.JobState.keys()}  # noqa: SIM118
    assert {state.value for state in JobState} == names - {"UNSPECIFIED"}
