"""Values of requests and responses: idempotency keys, digests, options, preferences, problems and CSV."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.api.errors import _PROBLEM_TYPES, to_problem
from service.api.params import parse_wait_seconds
from service.api.schemas import render_csv
from service.domain import errors
from service.domain.errors import IdempotencyKeyInvalid, InvalidOptions
from service.domain.ledger import MAX_IDEMPOTENCY_KEY_CHARS, Idempotency, digest_submission, parse_idempotency_key
from service.domain.tasks import (
    DEFAULT_CATALOGUE,
    Catalogue,
    FaceEnhanceOptions,
    Kind,
    Options,
    SeamlessOptions,
    UpscaleOptions,
    VectorizeOptions,
    parse_metadata,
    parse_options,
)

KEY = "8e03978e-40d5-43dd-bc93-6894a57f9324"
DIGEST = bytes(range(32))
METADATA = {"order": "17", "customer": "顾客"}
FULL = UpscaleOptions(
    scale=1.5,
    noise=1.01,
    steps=20,
    high_fidelity=True,
    strong_inpaint=True,
    inpaint_strength=0,
    prompt="红色的圆",
    negative_prompt="text",
    vector=True,
    colors=4,
)

printable = st.characters(min_codepoint=0x20, max_codepoint=0x7E)
plain = st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters='",;\\')


def quote_key(key: str) -> str:
    """Quote a string as in RFC 8941."""
    return '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'


def content_digest(options: Options, metadata: dict[str, str] | None = None, image: bytes = DIGEST) -> str:
    return digest_submission(KEY, options, metadata or {}, image).content_digest


@given(
    st.text(printable, min_size=1, max_size=MAX_IDEMPOTENCY_KEY_CHARS),
    st.text(plain, min_size=1, max_size=MAX_IDEMPOTENCY_KEY_CHARS),
)
def test_quoted_and_bare_key(quoted: str, bare: str) -> None:
    assert parse_idempotency_key([f" \t{quote_key(quoted)} "]) == quoted
    assert parse_idempotency_key([bare]) == bare


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
@example(b'"\\')
@example(b'"' * 300)
@example(b"\\" * 300)
def test_any_bytes(value: bytes) -> None:
    try:
        key = parse_idempotency_key([value.decode("latin-1")])
    except IdempotencyKeyInvalid:
        return
    assert key is not None
    assert 1 <= len(key) <= MAX_IDEMPOTENCY_KEY_CHARS
    assert all(" " <= character <= "~" for character in key)
    assert parse_idempotency_key([quote_key(key)]) == key


LONG_KEY = "k" * (MAX_IDEMPOTENCY_KEY_CHARS + 1)


@pytest.mark.parametrize("values", [["a", "b"], ["a", "a"], [LONG_KEY], [quote_key(LONG_KEY)], [""], ['""'], ["a,b"]])
def test_invalid_headers(values: list[str]) -> None:
    assert parse_idempotency_key([]) is None
    with pytest.raises(IdempotencyKeyInvalid):
        parse_idempotency_key(values)


@pytest.mark.parametrize(
    ("options", "digest"),
    [(UpscaleOptions(), "09e8c4af3f7f3caf448b93c62a820980"), (FULL, "4a6bec023910d623965edd03e62f875f")],
)
def test_digests_are_stable(options: Options, digest: str) -> None:
    # A changed digest would break replays over an upgrade.
    assert digest_submission(KEY, options, METADATA, DIGEST) == Idempotency("d77da8028f3c5a13752873cb9c7581d5", digest)


def test_every_field_counts() -> None:
    chosen = {name: getattr(FULL, name) for name in FULL.__struct_fields__}
    changed = [UpscaleOptions(**{name: value}) for name, value in chosen.items() if name not in {"model", "style"}]
    named = [UpscaleOptions(model="anime"), UpscaleOptions(style="anime"), UpscaleOptions(negative_prompt="红色的圆")]
    kinds = [UpscaleOptions(), VectorizeOptions(), VectorizeOptions(colors=4), FaceEnhanceOptions(), SeamlessOptions()]
    metadata = [{"order": "17"}, {"order": "18"}, {"17": "order"}, {"order": ""}, {"order": "17", "more": ""}]
    images = [bytes(32), b"\1" + bytes(31), bytes(31) + b"\1"]
    urls = [digest_submission(KEY, FULL, METADATA, DIGEST, url).content_digest for url in ("http://a/", "http://b/")]
    digests = [
        *urls,
        content_digest(FULL, METADATA),
        *(content_digest(item) for item in (*kinds, *named, *changed, FULL)),
        *(content_digest(UpscaleOptions(), item) for item in metadata),
        *(content_digest(UpscaleOptions(), image=image) for image in images),
    ]
    assert len(set(digests)) == len(digests)
    assert content_digest(FULL, METADATA) == content_digest(FULL, dict(reversed(METADATA.items())))
    assert content_digest(UpscaleOptions(inpaint_strength=0)) == content_digest(UpscaleOptions(inpaint_strength=-0.0))


def parse(kind: Kind, *fields: tuple[str, str]) -> Options:
    return parse_options(kind, fields, DEFAULT_CATALOGUE)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("scale", ["inf", " "]),
        ("noise", ["0.99", "1.2"]),
        ("steps", ["19", "41", "20.5"]),
        ("inpaint_strength", ["-0.1", "1.1"]),
        ("colors", ["1", "17"]),
        ("fit", ["0.5", ""]),
    ],
)
def test_invalid_values_are_named(name: str, texts: list[str]) -> None:
    for text in texts:
        with pytest.raises(InvalidOptions) as refused:
            parse(Kind.UPSCALE, (name, text))
        assert [error.field for error in refused.value.errors] == [name], text


def test_range_ends_and_empty_values_are_accepted() -> None:
    for fit in ("0.1", "0.9"):
        assert parse(Kind.SEAMLESS, ("fit", fit)) == SeamlessOptions(fit=float(fit))
    for colors in ("2", "16"):
        assert parse(Kind.UPSCALE, ("colors", colors), ("noise", "1.1"), ("inpaint_strength", "1")) == UpscaleOptions(
            colors=int(colors), noise=1.1, inpaint_strength=1
        )
    assert parse(Kind.UPSCALE, ("scale", "1"), ("vector", "TRUE"), ("prompt", "x" * 2_000)) == UpscaleOptions(
        scale=1, vector=True, prompt="x" * 2_000
    )
    fields = [("scale", ""), ("vector", ""), ("model", ""), ("steps", ""), ("steps", "20"), ("prompt", "")]
    assert parse(Kind.UPSCALE, *fields) == UpscaleOptions(steps=20)


def test_model_catalogue() -> None:
    catalogue = Catalogue(models={"general": "通用模型", "anime": "动漫模型"}, styles={"general": "通用风格"})
    for given_as in ("anime", "动漫模型"):
        assert parse_options(Kind.UPSCALE, [("model", given_as)], catalogue) == UpscaleOptions(model="anime")


def test_metadata() -> None:
    assert parse_metadata('{"order": "17", "用途": "封面"}') == {"order": "17", "用途": "封面"}
    assert len(parse_metadata('{"a": "' + "x" * 2_039 + '"}')["a"]) == 2_039
    for text in ("", '{"a": "' + "x" * 2_041 + '"}'):
        with pytest.raises(InvalidOptions, match="metadata"):
            parse_metadata(text)
    assert parse_metadata(None) == {}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        (["wait=10"], 10),
        (["WAIT = 7"], 7),
        (['wait="7"'], 7),
        ([",, wait=5 ,"], 5),
        # The first one counts.
        (["wait=5, wait=10"], 5),
        (["wait=soon", "wait=10"], 0),
        # Without a value, and beyond the cap, it is the longest.
        *(([header], 60) for header in ("wait", "WAIT", "wait=", 'wait=""', "wait ; reason=tea", "wait, wait=5")),
        *(([header], 60) for header in ("wait=61", "wait=100000", f"wait={'9' * 500}")),
        # These are ignored.
        ([], 0),
        *(([header], 0) for header in ("", "wait=0", "wait=-1", "wait=1.5", "wait=1 0", "wait=0x10", "wait=٣")),
        *(([header], 0) for header in ("wait 5", "waiting=5", "await=5", 'note="a, wait=5"', 'note="\\", wait=5')),
        *(([header], 0) for header in ('wait="5', "wait='5'", f"wait=5, {'x' * 1000}")),
    ],
)
def test_wait_of_the_prefer_header(headers: list[str], seconds: int) -> None:
    assert parse_wait_seconds(headers) == seconds


def test_every_error_is_in_the_table() -> None:
    classes = [
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.GatewayError)
    ]
    bases = {base for cls in classes for base in cls.__mro__[1:]}
    assert [cls for cls in classes if cls not in bases and _PROBLEM_TYPES.keys().isdisjoint(cls.__mro__)] == []
    assert len(classes) > len(_PROBLEM_TYPES)


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (2.0, "2"), (-3.5, "0")])
def test_retry_after_is_rounded_up(seconds: float, header: str) -> None:
    assert to_problem(errors.Overloaded("Later.", retry_after=seconds)).headers["Retry-After"] == header


CELLS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.integers() | st.none()


@given(st.lists(st.tuples(CELLS, CELLS)))
def test_cells_are_no_formulas(rows: list[tuple[object, object]]) -> None:
    content = render_csv(["one", "other"], rows).decode()
    read_back = list(csv.reader(io.StringIO(content, newline=""), strict=True))[1:]
    for cells, row in zip(read_back, rows, strict=True):
        for cell, value in zip(cells, row, strict=True):
            assert cell.removeprefix("'").endswith("" if value is None else str(value).removeprefix("'"))
            if isinstance(value, str):
                assert cell[0] not in "=+-@\t\r\n"
            elif value is not None:
                assert cell == str(value)
