"""Options of the task kinds in form fields."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.errors import InvalidOptions
from service.domain.tasks import (
    DEFAULT_CATALOGUE,
    Catalogue,
    Kind,
    Options,
    SeamlessOptions,
    UpscaleOptions,
    parse_metadata,
    parse_options,
)


def parse(kind: Kind, *fields: tuple[str, str]) -> Options:
    return parse_options(kind, fields, DEFAULT_CATALOGUE)


def invalid_fields(kind: Kind, *fields: tuple[str, str]) -> list[str]:
    with pytest.raises(InvalidOptions) as refused:
        parse(kind, *fields)
    return [error.field for error in refused.value.errors]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("scale", ["8.01", "0.99", "nan", "inf", " ", "two"]),
        ("noise", ["0.99", "1.2"]),
        ("steps", ["19", "41", "20.5"]),
        ("high_fidelity", ["yes"]),
        ("inpaint_strength", ["-0.1", "1.1"]),
        ("prompt", ["x" * 2_001]),
        ("colors", ["1", "17"]),
        ("model", ["anime"]),
        ("fit", ["0.5", ""]),
    ],
)
def test_invalid_values_are_named(name: str, texts: list[str]) -> None:
    for text in texts:
        assert invalid_fields(Kind.UPSCALE, (name, text)) == [name], text


def test_all_invalid_fields_are_named() -> None:
    assert invalid_fields(Kind.SEAMLESS, ("fit", "0.05"), ("colors", "5"), ("fit", "0.5")) == ["fit", "colors"]
    assert invalid_fields(Kind.SEAMLESS, ("fit", "0.5"), ("fit", "0.5")) == ["fit"]
    assert invalid_fields(Kind.FACE_ENHANCE, ("fit", "0.5")) == ["fit"]


@given(
    scale=st.floats(1, 8),
    steps=st.integers(20, 40),
    flag=st.booleans(),
    prompt=st.text(max_size=2_000),
    upper=st.booleans(),
)
def test_values_in_range_are_accepted(*, scale: float, steps: int, flag: bool, prompt: str, upper: bool) -> None:
    word = str(flag).upper() if upper else str(flag).lower()
    options = parse(Kind.UPSCALE, ("scale", repr(scale)), ("steps", str(steps)), ("vector", word), ("prompt", prompt))
    assert options == UpscaleOptions(scale=scale, steps=steps, vector=flag, prompt=prompt)


def test_range_ends_and_empty_values_are_accepted() -> None:
    for fit in ("0.1", "0.9"):
        assert parse(Kind.SEAMLESS, ("fit", fit)) == SeamlessOptions(fit=float(fit))
    for colors in ("2", "16"):
        assert parse(Kind.UPSCALE, ("colors", colors), ("noise", "1.1"), ("inpaint_strength", "1")) == UpscaleOptions(
            colors=int(colors), noise=1.1, inpaint_strength=1
        )
    fields = [("scale", ""), ("vector", ""), ("model", ""), ("steps", ""), ("steps", "20"), ("prompt", "")]
    assert parse(Kind.UPSCALE, *fields) == UpscaleOptions(steps=20)


def test_model_catalogue() -> None:
    catalogue = Catalogue(models={"general": "通用模型", "anime": "动漫模型"}, styles={"general": "通用风格"})
    for given_as in ("anime", "动漫模型"):
        assert parse_options(Kind.UPSCALE, [("model", given_as)], catalogue) == UpscaleOptions(model="anime")
    assert catalogue.vendor_word("model", "anime") == "动漫模型"
    assert catalogue.vendor_word("style", "gone") == "gone"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": null}', '{"a": "' + "x" * 2_041 + '"}'])
def test_invalid_metadata(text: str) -> None:
    with pytest.raises(InvalidOptions, match="metadata"):
        parse_metadata(text)


def test_metadata() -> None:
    assert parse_metadata('{"order": "17", "用途": "封面"}') == {"order": "17", "用途": "封面"}
    assert len(parse_metadata('{"a": "' + "x" * 2_039 + '"}')["a"]) == 2_039
    assert parse_metadata(None) == {}
