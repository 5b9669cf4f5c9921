"""Rows come back in order and whole, however they arrive and wherever they waited."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ingest.reorder import RowOrder


@given(st.permutations(range(25)), st.integers(0, 400))
def test_any_order_in_row_order_out(arrival: list[int], memory_bytes: int) -> None:
    order = RowOrder(memory_bytes)
    found = []
    for number in arrival:
        picture = None if number % 4 == 0 else bytes([number]) * (number * 3)
        order.add(number, {"row": number}, picture)
        found += list(order.ready())
    order.close()
    assert found == [
        ({"row": number}, None if number % 4 == 0 else bytes([number]) * (number * 3)) for number in range(25)
    ]


def test_what_waits_on_disk_leaves_no_file(tmp_path: Path) -> None:
    order = RowOrder(10, str(tmp_path))
    for number in range(1, 50):
        order.add(number, {}, bytes(1000))
    assert list(tmp_path.iterdir()) == []
    order.add(0, {}, b"first")
    assert [len(picture or b"") for _, picture in order.ready()] == [5, *[1000] * 49]
    order.close()
