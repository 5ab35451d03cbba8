"""The demo's report."""

import pytest

from service.demo.client import Cost
from service.demo.run import format_cost


@pytest.mark.parametrize(
    ("cost", "text"),
    [
        (Cost(count=1, money=0, basis="observed"), "1 use"),
        (Cost(count=2, money=None, basis="observed"), "2 uses"),
        (Cost(count=0, money=0.5, basis="observed"), "¥0.50"),
        (Cost(count=1, money=2, basis="observed"), "1 use + ¥2.00"),
        (Cost(count=0, money=0, basis="observed"), "nothing"),
        (Cost(count=1, money=0, basis="estimated"), "~1 use"),
        (Cost(count=1, money=0, basis="unknown"), "?"),
        (None, "?"),
    ],
)
def test_cost(cost: Cost | None, text: str) -> None:
    """A cost is shown as uses, yuan or both, and marked if uncertain."""
    assert format_cost(cost) == text
