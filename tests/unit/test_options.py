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
    SeamlessOptions,
    UpscaleOptions,
    parse_metadata,
    parse_options,
)


def option_errors(kind: Kind, *fields: tuple[str, str]) -> dict[str, str]:
    with pytest.raises(InvalidOptions) as caught:
        parse_options(kind, fields, DEFAULT_CATALOGUE)
    return {error.field: error.detail for error in caught.value.errors}


@pytest.mark.parametrize(
    ("name", "text", "detail"),
    [
        ("scale", "8.01", "must be a number from 1 to 8"),
        ("scale", "0.99", "must be a number from 1 to 8"),
        ("scale", "nan", "must be a number from 1 to 8"),
        ("scale", "inf", "must be a number from 1 to 8"),
        ("scale", " ", "must be a number from 1 to 8"),
        ("scale", "two", "must be a number from 1 to 8"),
        ("noise", "1.2", "must be a number from 1 to 1.1"),
        ("steps", "41", "must be a whole number from 20 to 40"),
        ("steps", "20.5", "must be a whole number from 20 to 40"),
        ("high_fidelity", "yes", "must be true or false"),
        ("inpaint_strength", "-0.1", "must be a number from 0 to 1"),
        ("prompt", "x" * 2_001, "must be text of at most 2000 characters"),
        ("colors", "1", "must be a whole number from 2 to 16"),
        ("model", "anime", "must be one of general"),
        ("fit", "0.5", "is not an option; this kind takes"),
    ],
)
def test_invalid_values_are_named(name: str, text: str, detail: str) -> None:
    assert option_errors(Kind.UPSCALE, (name, text))[name].startswith(detail)


def test_all_invalid_fields_are_named() -> None:
    errors = option_errors(Kind.SEAMLESS, ("fit", "0.05"), ("colors", "5"), ("fit", "0.5"))
    assert set(errors) == {"fit", "colors"}
    assert option_errors(Kind.SEAMLESS, ("fit", "0.5"), ("fit", "0.5")) == {"fit": "is given more than once"}
    assert option_errors(Kind.FACE_ENHANCE, ("fit", "0.5")) == {"fit": "is not an option; this kind takes no options"}


@given(
    scale=st.floats(1, 8),
    steps=st.integers(20, 40),
    flag=st.booleans(),
    prompt=st.text(max_size=2_000),
    upper=st.booleans(),
)
def test_values_in_range_are_accepted(*, scale: float, steps: int, flag: bool, prompt: str, upper: bool) -> None:
    word = str(flag).upper() if upper else str(flag).lower()
    fields = [("scale", repr(scale)), ("steps", str(steps)), ("vector", word), ("prompt", prompt)]
    options = parse_options(Kind.UPSCALE, fields, DEFAULT_CATALOGUE)
    assert options == UpscaleOptions(scale=scale, steps=steps, vector=flag, prompt=prompt)


def test_empty_option_is_the_default() -> None:
    fields = [("scale", ""), ("vector", ""), ("model", ""), ("steps", ""), ("steps", "20"), ("prompt", "")]
    assert parse_options(Kind.UPSCALE, fields, DEFAULT_CATALOGUE) == UpscaleOptions(steps=20)
    assert option_errors(Kind.UPSCALE, ("fit", "")).keys() == {"fit"}


def test_range_ends_are_accepted() -> None:
    for fit in ("0.1", "0.9"):
        assert parse_options(Kind.SEAMLESS, [("fit", fit)], DEFAULT_CATALOGUE) == SeamlessOptions(fit=float(fit))


def test_model_catalogue() -> None:
    catalogue = Catalogue(models={"general": "通用模型", "anime": "动漫模型"}, styles={"general": "通用风格"})
    for given_as in ("anime", "动漫模型"):
        options = parse_options(Kind.UPSCALE, [("model", given_as)], catalogue)
        assert isinstance(options, UpscaleOptions)
        assert options.model == "anime"
    assert catalogue.vendor_word("model", "anime") == "动漫模型"
    assert catalogue.vendor_word("style", "gone") == "gone"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": null}', '"a"', '{"a": "' + "x" * 2_048 + '"}'])
def test_invalid_metadata(text: str) -> None:
    with pytest.raises(InvalidOptions, match="metadata"):
        parse_metadata(text)


def test_metadata() -> None:
    assert parse_metadata('{"order": "17", "用途": "封面"}') == {"order": "17", "用途": "封面"}
    assert parse_metadata(None) == {}
