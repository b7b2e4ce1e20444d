import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidInput
from service.storage import pagination


@pytest.mark.parametrize(("asked", "meant"), [(0, 50), (1, 1), (1000, 1000)])
def test_zero_means_fifty_and_one_to_a_thousand_are_taken(asked: int, meant: int) -> None:
    assert pagination.size(asked) == meant


@pytest.mark.parametrize("asked", [-1, 1001])
def test_other_sizes_are_refused(asked: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        pagination.size(asked)
    assert caught.value.field == "page_size"


@given(st.text(), st.floats(allow_nan=False, allow_infinity=False))
def test_a_token_leads_back_to_its_key(name: str, number: float) -> None:
    token = pagination.token("list", "acme", name, number)
    assert pagination.key("list", "acme", token, str, float) == (name, number)


def test_no_token_means_the_first_page() -> None:
    assert pagination.key("list", "acme", "", str) is None


OTHERS = [
    pagination.token("other", "acme", "x"),
    pagination.token("list", "zoo", "x"),
    pagination.token("list", "acme", 1),
    pagination.token("list", "acme", "x", "y"),
]


@given(st.text(min_size=1) | st.sampled_from(OTHERS))
def test_a_token_of_another_list_or_tenant_or_of_none_is_refused(token: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        pagination.key("list", "acme", token, str)
    assert caught.value.field == "page_token"


def test_a_page_ends_at_its_size_or_when_its_texts_are_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pagination, "MAX_BYTES", 10)
    rows = [{"text": "x" * 4, "key": n} for n in range(5)]
    assert pagination.page(rows, 2, "text") == (rows[:2], True)
    assert pagination.page(rows[:2], 2, "text") == (rows[:2], False)
    assert pagination.page(rows, 5, "text") == (rows[:3], True)
    # One that is too long alone is a page of its own.
    assert pagination.page([{"text": "x" * 99}], 5, "text") == ([{"text": "x" * 99}], False)
