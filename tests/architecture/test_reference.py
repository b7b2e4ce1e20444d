"""docs/reference/ is what the code says; `make reference` writes it."""

import pytest

from docs.generate import OUT, PAGES, page


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_the_reference_is_not_stale(name: str) -> None:
    assert (OUT / name).read_text("utf-8") == page(name), "run `make reference`"
