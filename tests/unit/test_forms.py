"""Bodies of forms: their pieces and their length."""

from __future__ import annotations

import pytest

from service.clients.forms import PIECE_BYTES, FormBody, FormFile

HALF = PIECE_BYTES // 2


@pytest.mark.parametrize(
    ("size", "pieces"),
    [(0, 1), (HALF, 1), (PIECE_BYTES, 2), (2 * PIECE_BYTES, 3), (2 * PIECE_BYTES - HALF, 2), (10 * PIECE_BYTES, 11)],
)
async def test_fields_and_head_of_the_file_are_in_the_first_of_few_pieces(size: int, pieces: int) -> None:
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    form = FormBody({"a": "通用", "b": "x" * 90}, FormFile("image", "x.png", "image/png", content))
    sent = [bytes(piece) async for piece in form]
    head, _, rest = b"".join(sent).partition(b"image/png\r\n\r\n")
    assert len(sent) == pieces
    assert head in sent[0]
    assert b'name="a"\r\n\r\n' + "通用".encode() + b"\r\n--" in head
    assert rest.startswith(content + b"\r\n--")
    assert form.headers["Content-Length"] == str(sum(map(len, sent)))


async def test_fields_larger_than_a_piece_are_in_one() -> None:
    form = FormBody({"a": "x" * 2 * PIECE_BYTES}, FormFile("image", "x.png", "image/png", b"y"))
    assert [len(piece) > 2 * PIECE_BYTES async for piece in form] == [True, False]
