"""Bodies of forms: their pieces and their length."""

from __future__ import annotations

import pytest

from service.clients.forms import PIECE_BYTES, FormBody, FormFile

HALF = PIECE_BYTES // 2


@pytest.mark.parametrize(
    ("size", "pieces"),
    [(0, 1), (HALF, 1), (PIECE_BYTES, 1), (PIECE_BYTES + 1, 2), (2 * PIECE_BYTES + HALF, 3), (10 * PIECE_BYTES, 10)],
)
def test_fields_and_head_of_the_file_are_in_the_first_of_few_pieces(size: int, pieces: int) -> None:
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    form = FormBody({"a": "通用", "b": "x" * 90}, FormFile("image", "x.png", "image/png", content))
    sent = list(form.split(b"POST\r\n\r\n"))
    head, _, rest = b"".join(part for piece in sent for part in piece).partition(b"image/png\r\n\r\n")
    assert len(sent) == pieces
    assert bytes(sent[0][0]).startswith(head)
    assert head.startswith(b"POST\r\n\r\n--")
    assert b'name="a"\r\n\r\n' + "通用".encode() + b"\r\n--" in head
    assert rest.startswith(content + b"\r\n--")
    assert form.size == sum(len(part) for piece in sent for part in piece) - len(b"POST\r\n\r\n")
    assert all(part.obj is content for piece in sent for part in piece if isinstance(part, memoryview))
