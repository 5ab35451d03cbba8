"""Options of the task kinds in form fields."""

from __future__ import annotations

import pytest

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
