"""Reports are given out with the version's number, and say how it stands."""

import json

import pytest

from service.contract import REPORT_STANDING_MARK, REPORT_VERSION_MARK
from service.errors import Damaged, Reason
from service.storage import reports

PAGE = (
    "<title>birds: report</title>"
    f"<h1>birds{REPORT_VERSION_MARK}</h1>{REPORT_STANDING_MARK}<svg><title>a dot</title></svg>"
).encode()


def test_a_published_version_has_its_number_in_title_and_heading() -> None:
    page = reports.filled_html(PAGE, 3, False, []).decode()
    assert page == (
        "<title>birds: report, version 3</title><h1>birds version 3</h1>"
        "<svg><title>a dot</title></svg>"
    )


def test_a_candidate_is_called_one_and_says_why() -> None:
    page = reports.filled_html(PAGE, 3, True, ["0.8 < 0.9"]).decode()
    assert "<title>birds: report, version 3 (candidate)</title>" in page
    assert "<h1>birds version 3 (candidate)</h1>" in page
    assert "it did not pass its gate, and no alias moved to it. 0.8 &lt; 0.9." in page


def test_a_candidate_that_was_promoted_says_so() -> None:
    page = reports.filled_html(PAGE, 3, False, ["too slow"]).decode()
    assert "(candidate)" not in page
    assert "did not pass its gate and was published by hand. too slow." in page


def test_the_json_has_the_same_and_keeps_everything_else() -> None:
    content = b'{"format": 1, "version": null, "metrics": {"accuracy": 0.123456789012345678}}'
    filled = reports.filled_json(content, 7, True, ["too slow"])
    assert b"0.123456789012345678" in filled
    assert json.loads(filled) == {
        "format": 1,
        "version": 7,
        "metrics": {"accuracy": 0.12345678901234568},
        "is_candidate": True,
        "gate_failures": ["too slow"],
    }


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"format": 1', b"\xff"])
def test_a_report_that_is_no_json_object_is_damaged(content: bytes) -> None:
    with pytest.raises(Damaged) as error:
        reports.filled_json(content, 1, False, [])
    assert error.value.reason == Reason.MODEL_UNLOADABLE


def test_a_page_that_is_no_text_is_damaged() -> None:
    with pytest.raises(Damaged) as error:
        reports.filled_html(b"\xff\xfe", 1, False, [])
    assert error.value.reason == Reason.MODEL_UNLOADABLE
