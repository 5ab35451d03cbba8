"""Guides for the tenants' engineers and for operators: their lists, and the facts that they state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from html import escape

import msgspec
from msgspec import Struct

from service.api.form_parser import MAX_FORM_BYTES, MAX_JSON_BYTES
from service.api.pages import Asset, Link, fill, page_asset, read_text, render_links, render_markdown, render_page
from service.api.params import MAX_WAIT_SECONDS
from service.api.tasks import MAX_STREAM_SECONDS
from service.domain.image_urls import MAX_IMAGE_URL_CHARS
from service.domain.ledger import MAX_IDEMPOTENCY_KEY_CHARS
from service.domain.tasks import MAX_METADATA_BYTES, MAX_PROMPT_CHARS, OPTIONS, VENDOR_FIELDS, Catalogue, Kind
from service.domain.webhooks import RETRY_SECONDS
from service.usecases.reports import MAX_DAYS
from service.usecases.task_status import HEARTBEAT_SECONDS

GUIDE_NAMES = (
    "first-task",
    "client",
    "waiting",
    "webhooks",
    "quotas",
    "idempotency",
    "migration",
    "limits",
    "production",
)
"""In reading order: each is a file of the folder `pages/guides`, which begins with its title and its summary."""
OPERATOR_GUIDE_NAMES = ("operating",)
_KIB, _MIB = 1 << 10, 1 << 20


class Limits(Struct, frozen=True):
    """Settings that concern tenants."""

    max_image_bytes: int
    max_image_pixels: int
    image_url_seconds: int
    max_artifact_bytes: int
    task_retention_days: int
    reads_per_second: int
    poll_seconds: float
    lease_seconds: int


class Guide(Struct, frozen=True):
    """A guide, of which `text` is the Markdown after its title and summary."""

    name: str
    title: str
    summary: str
    text: str

    @property
    def path(self) -> str:
        return f"docs/{self.name}"


@cache
def load_guides(names: Sequence[str]) -> Sequence[Guide]:
    return [_load_guide(name) for name in names]


def guide_assets(
    names: Sequence[str], limits: Limits, catalogue: Catalogue, links: Sequence[Link]
) -> Mapping[str, Asset]:
    """Return the guides of these names; `links` are those to the other pages."""
    facts, guides = _collect_facts(limits, catalogue), load_guides(names)
    return {guide.name: page_asset(partial(_render_guide, guide, guides, facts, links)) for guide in guides}


def render_cards(names: Sequence[str], playground: str | None = None) -> str:
    """Return links to the playground, if there is one at this path, and to each guide, for the page `docs`."""
    cards = [(guide.path, guide.title, guide.summary) for guide in load_guides(names)]
    if playground:
        cards.insert(
            0, (playground, "Try it in the browser", "Send a picture of yours or a sample, and see the result.")
        )
    items = "".join(f'<li><a href="{path}">{escape(title)}</a><p>{escape(summary)}' for path, title, summary in cards)
    return f"""<section class="start" aria-labelledby="guides">
<h2 id="guides">Start here</h2>
<ul class="cards">{items}</ul>
</section>"""


def _load_guide(name: str) -> Guide:
    title, summary, text = read_text(f"guides/{name}.md").split("\n\n", 2)
    return Guide(name, title.removeprefix("# "), summary.replace("\n", " "), text)


def _render_guide(guide: Guide, guides: Sequence[Guide], facts: Mapping[str, str], links: Sequence[Link]) -> bytes:
    html, sections = render_markdown(fill(guide.text, facts))
    entries = "".join(f'<li><a href="#{item.fragment}">{escape(item.title)}</a>' for item in sections)
    others = [Link(other.path, other.title) for other in guides]
    content = f"""<div class="columns">
<main id="content">
<h1>{escape(guide.title)}</h1>
<p class="lead">{escape(guide.summary)}
{html}</main>
<nav class="side" aria-label="Guides"><h2>Guides</h2>
<ul>{render_links(others, path=guide.path, inner=f"<ul>{entries}</ul>")}</ul></nav>
</div>"""
    return render_page(guide.title, content, path=guide.path, links=links)


def _collect_facts(limits: Limits, catalogue: Catalogue) -> dict[str, str]:
    """Return what the guides state of settings and constants, so that it is true of this gateway."""
    return {
        "max_image": _format_size(limits.max_image_bytes),
        "max_pixels": f"{limits.max_image_pixels:,}",
        "image_url_seconds": str(limits.image_url_seconds),
        "max_json": _format_size(MAX_JSON_BYTES),
        "max_form": _format_size(MAX_FORM_BYTES),
        "max_result": _format_size(limits.max_artifact_bytes),
        "retention_days": str(limits.task_retention_days),
        "reads": f"{limits.reads_per_second:,} a second" if limits.reads_per_second else "without a limit",
        "poll_seconds": f"{limits.poll_seconds:g}",
        "submit_seconds": str(limits.lease_seconds),
        "wait_seconds": str(MAX_WAIT_SECONDS),
        "stream_minutes": f"{MAX_STREAM_SECONDS / 60:g}",
        "heartbeat_seconds": f"{HEARTBEAT_SECONDS:g}",
        "webhook_attempts": str(len(RETRY_SECONDS) + 1),
        "url_chars": f"{MAX_IMAGE_URL_CHARS:,}",
        "key_chars": str(MAX_IDEMPOTENCY_KEY_CHARS),
        "prompt_chars": f"{MAX_PROMPT_CHARS:,}",
        "metadata_bytes": f"{MAX_METADATA_BYTES:,}",
        "usage_days": str(MAX_DAYS),
        "models": ", ".join(f"`{name}`" for name in catalogue.models),
        "styles": ", ".join(f"`{name}`" for name in catalogue.styles),
        "options": "\n".join(_format_options(kind) for kind in Kind),
    }


def _format_size(size: int) -> str:
    if size % _MIB == 0:
        return f"{size // _MIB} MiB"
    return f"{size // _KIB} KiB" if size % _KIB == 0 else f"{size:,} bytes"


def _format_options(kind: Kind) -> str:
    """Return a table of the options of a kind in Markdown, empty without options."""
    _, components = msgspec.json.schema_components([OPTIONS[kind]])
    properties = components[OPTIONS[kind].__name__]["properties"]
    if not properties:
        return f"### {kind}\n\nIt has no options.\n"
    rows = "".join(
        f"| `{name}` | `{VENDOR_FIELDS[name]}` | {_format_range(schema)} | `{_format_default(schema['default'])}` |\n"
        for name, schema in properties.items()
    )
    return f"### {kind}\n\n| option | vendor's field | values | default |\n| --- | --- | --- | --- |\n{rows}"


def _format_range(schema: Mapping[str, object]) -> str:
    if "minimum" in schema:
        noun = "whole number" if schema["type"] == "integer" else "number"
        return f"{noun} from {schema['minimum']} to {schema['maximum']}"
    return "`true` or `false`" if schema["type"] == "boolean" else "text"


def _format_default(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or " "
