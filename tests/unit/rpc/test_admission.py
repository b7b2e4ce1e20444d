"""Slots: counted by method and tenant with the bytes that they hold, and given back."""

import pytest

from service.errors import Exhausted
from service.rpc.admission import Admission, CallLimits

EXPORT = "/graft.v1.ModelService/ExportModel"
CHECK = "/grpc.health.v1.Health/Check"


def test_a_tenant_gets_back_what_it_released_and_others_the_rest() -> None:
    admission = Admission(CallLimits(exports=4, held_bytes=100))
    for _ in range(3):
        one, another = admission.admit(EXPORT, "acme"), admission.admit(EXPORT, "acme")
        one.hold(50)
        with pytest.raises(Exhausted, match=f"2 calls of {EXPORT} of tenant acme"):
            admission.admit(EXPORT, "acme")
        other = admission.admit(EXPORT, "zoo")
        other.hold(50)
        one.release_bytes(50)
        one.hold(50)
        for slot in (one, another, other):
            slot.release()
    everybody = admission.admit(EXPORT)
    everybody.hold(100)
    everybody.release()
    assert admission.is_empty


def test_health_checks_are_admitted_while_requests_hold_all_and_are_not_waited_for() -> None:
    admission = Admission(CallLimits(held_bytes=10))
    export = admission.admit(EXPORT)
    export.hold(10)
    with pytest.raises(Exhausted, match="requests of 0 MiB"):
        admission.admit(EXPORT)
    check = admission.admit(CHECK)
    check.hold(1000)
    assert not admission.is_empty
    export.release()
    assert admission.is_empty
