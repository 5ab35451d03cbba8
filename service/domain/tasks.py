"""Tasks, their options and costs, and their encrypted ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta, Struct

from service.domain.errors import FieldError, InvalidOptions, check_json, expected_format

MAX_PROMPT_CHARS = 2_000
MAX_METADATA_BYTES = 2_048


class Kind(StrEnum):
    """An operation on an image; the values are part of the HTTP contract."""

    UPSCALE = "upscale"
    VECTORIZE = "vectorize"
    FACE_ENHANCE = "face-enhance"
    SEAMLESS = "seamless"


class State(StrEnum):
    """The state of a task: queued until the first check, then running, then final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self in {State.SUCCEEDED, State.FAILED}


class ArtifactName(StrEnum):
    IMAGE = "image"
    VECTOR = "vector"
    GRID = "grid"


class CostBasis(StrEnum):
    """The basis of a cost: observed in the balance, estimated from an earlier price, or unknown."""

    OBSERVED = "observed"
    ESTIMATED = "estimated"
    UNKNOWN = "unknown"


Colors = Annotated[int, Meta(ge=2, le=16, description="How many colours the vector image has.")]
Prompt = Annotated[str, Meta(max_length=MAX_PROMPT_CHARS)]


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a kind; one subclass per kind, with the ranges in the annotations."""

    kind: ClassVar[Kind]


class UpscaleOptions(Options, frozen=True):
    """Redraw in high definition."""

    kind: ClassVar[Kind] = Kind.UPSCALE
    model: Annotated[str, Meta(description="A name of the catalogue, or the upstream's own word for it.")] = "general"
    style: Annotated[str, Meta(description="A name of the catalogue, or the upstream's own word for it.")] = "general"
    scale: Annotated[float, Meta(ge=1, le=8, description="Factor by which the image grows.")] = 2.0
    noise: Annotated[float, Meta(ge=1, le=1.1, description="Noise added before redrawing.")] = 1.003
    steps: Annotated[int, Meta(ge=20, le=40, description="Sampling steps: more is slower.")] = 30
    high_fidelity: Annotated[bool, Meta(description="Stay closer to the original.")] = False
    strong_inpaint: Annotated[bool, Meta(description="Repair damaged parts strongly.")] = False
    inpaint_strength: Annotated[float, Meta(ge=0, le=1, description="How strongly to repair.")] = 0.5
    prompt: Annotated[Prompt, Meta(description="What the image shows.")] = ""
    negative_prompt: Annotated[Prompt, Meta(description="What the image must not show.")] = ""
    vector: Annotated[bool, Meta(description="Make a vector image of the result too.")] = False
    colors: Colors = 5


class VectorizeOptions(Options, frozen=True):
    """Turn a bitmap of few colours into a vector image."""

    kind: ClassVar[Kind] = Kind.VECTORIZE
    colors: Colors = 5


class FaceEnhanceOptions(Options, frozen=True):
    """Restore the faces in an image."""

    kind: ClassVar[Kind] = Kind.FACE_ENHANCE


class SeamlessOptions(Options, frozen=True):
    """Make an image tile without seams."""

    kind: ClassVar[Kind] = Kind.SEAMLESS
    fit: Annotated[float, Meta(ge=0.1, le=0.9, description="Larger: smoother seams, less detail of the original.")] = (
        0.5
    )


OPTIONS: Mapping[Kind, type[Options]] = {
    cls.kind: cls for cls in (UpscaleOptions, VectorizeOptions, FaceEnhanceOptions, SeamlessOptions)
}
_OPTION_TYPES: Mapping[Kind, Mapping[str, Any]] = {
    kind: {field.name: field.type for field in msgspec.structs.fields(cls)} for kind, cls in OPTIONS.items()
}
"""Types of the options by name: `msgspec.structs.fields` takes 250 us."""
VENDOR_FIELDS: Mapping[str, str] = {
    "model": "sdxl_model_dropdown",
    "style": "style_dropdown",
    "scale": "upscale",
    "noise": "s_noise",
    "steps": "steps",
    "high_fidelity": "high_fidelity",
    "strong_inpaint": "strong_inpaint",
    "inpaint_strength": "strong_inpaint_intensity",
    "prompt": "prompt",
    "negative_prompt": "neg_prompt",
    "vector": "vector_switch",
    "colors": "color_count",
    "fit": "fit",
}
"""Names of the options in the vendor's forms."""


class Catalogue(Struct, frozen=True):
    """Names of models and styles, each with the vendor's word."""

    models: Mapping[str, str]
    styles: Mapping[str, str]

    def find_name(self, field: str, value: str) -> str:
        """Return the catalogue's name for a name or a vendor word. Raises FieldError."""
        words = self._vendor_words(field)
        if value in words:
            return value
        for name, word in words.items():
            if word == value:
                return name
        raise FieldError(field, f"must be one of {', '.join(words)}")

    def vendor_word(self, field: str, name: str) -> str:
        """Return the vendor's word for a name; a name that left the catalogue stands for itself."""
        return self._vendor_words(field).get(name, name)

    def _vendor_words(self, field: str) -> Mapping[str, str]:
        return self.models if field == "model" else self.styles


DEFAULT_CATALOGUE = Catalogue(models={"general": "通用模型"}, styles={"general": "通用风格"})


def parse_options(
    kind: Kind, fields: Sequence[tuple[str, Any]], catalogue: Catalogue, *, is_typed: bool = False
) -> Options:
    """Parse the options of a kind from form fields, of which an empty one counts as absent, or from typed values.

    Raises InvalidOptions with every field that is unknown, repeated, mistyped or out of range.
    """
    cls = OPTIONS[kind]
    types = _OPTION_TYPES[kind]
    values: dict[str, Any] = {}
    errors: list[FieldError] = []
    for name, value in fields:
        try:
            if name not in types:
                options = f"this kind takes {', '.join(types)}" if types else "this kind takes no options"
                raise FieldError(name, f"is not an option; {options}")
            if not (value or is_typed):
                continue
            if name in values:
                raise FieldError(name, "is given more than once")
            values[name] = msgspec.convert(value, types[name], strict=is_typed)
            if name in {"model", "style"}:
                values[name] = catalogue.find_name(name, value)
        except msgspec.ValidationError:
            errors.append(FieldError(name, expected_format(types[name])))
        except FieldError as error:  # a copy: its traceback would hold this frame, and the frame holds it
            errors.append(FieldError(error.field, error.detail))
    if errors:
        raise InvalidOptions(errors)
    return cls(**values)


def parse_metadata(text: str | None) -> dict[str, str]:
    """Parse the caller's labels: a JSON object of strings. Raises InvalidOptions."""
    if text is None:
        return {}
    try:
        _check_metadata_size(text.encode())
        check_json(text)
        return msgspec.json.decode(text, type=dict[str, str])
    except ValueError:  # includes msgspec.DecodeError and UnicodeError
        raise _invalid_metadata() from None


def check_metadata(value: Any) -> dict[str, str]:
    """Check the caller's labels within a JSON body. Raises InvalidOptions."""
    try:
        metadata = msgspec.convert(value, dict[str, str])
    except msgspec.ValidationError:
        raise _invalid_metadata() from None
    _check_metadata_size(msgspec.json.encode(metadata))
    return metadata


def _check_metadata_size(encoded: bytes) -> None:
    if len(encoded) > MAX_METADATA_BYTES:
        raise InvalidOptions([FieldError("metadata", f"must be at most {MAX_METADATA_BYTES} bytes")])


def _invalid_metadata() -> InvalidOptions:
    return InvalidOptions([FieldError("metadata", "must be a JSON object of strings, each name once")])


class Artifact(Struct, frozen=True, omit_defaults=True):
    """A result of a task, at the upstream's URL.

    If that contains the account's key, `url` is without it and `encrypted_url` is the whole.
    """

    name: ArtifactName
    url: str
    encrypted_url: bytes | None = None


class TaskError(Struct, frozen=True):
    code: str
    detail: str


class Cost(Struct, frozen=True):
    """The cost of a task: prepaid uses and money in fen."""

    count: int
    money_fen: int
    basis: CostBasis


class Task(Struct, frozen=True, kw_only=True):
    """A task; times in milliseconds of server time.

    `version` grows with every visible change; `last_checked_at` is when the upstream last reported on it.
    """

    id: str
    reservation: str
    tenant: int
    account: int
    kind: Kind
    state: State
    created_at: int
    updated_at: int
    finished_at: int | None = None
    options: msgspec.Raw
    metadata: msgspec.Raw
    artifacts: tuple[Artifact, ...] = ()
    error: TaskError | None = None
    cost: Cost = Cost(0, 0, CostBasis.UNKNOWN)
    version: int
    last_checked_at: int
    webhook_url: str | None = None
    trace_context: str | None = None


class TaskReference(Struct, frozen=True, array_like=True):
    """The content of a task id, which suffices to query the upstream; `created_at` in milliseconds."""

    tenant: int
    account: int
    kind: Kind
    created_at: int
    reservation: str
    upstream_id: str


def new_task(
    reference: TaskReference, task_id: str, *, state: State, options: msgspec.Raw, metadata: msgspec.Raw, version: int
) -> Task:
    """Build a task without results; its cost is unknown."""
    return Task(
        id=task_id,
        reservation=reference.reservation,
        tenant=reference.tenant,
        account=reference.account,
        kind=reference.kind,
        state=state,
        created_at=reference.created_at,
        updated_at=reference.created_at,
        options=options,
        metadata=metadata,
        version=version,
        last_checked_at=reference.created_at,
    )


class Backlog(Struct, frozen=True):
    """A number of waiting items, and the delay of the first unclaimed one (0 if none is due)."""

    length: int
    overdue_ms: int
