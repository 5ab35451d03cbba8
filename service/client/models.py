"""The resources of the API, as callers see them. Fields that a later gateway adds are ignored."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Literal, TypeAlias, TypedDict

from msgspec import UNSET, Meta, Struct, UnsetType

KindName: TypeAlias = Literal["upscale", "vectorize", "face-enhance", "seamless"]
StateName: TypeAlias = Literal["queued", "running", "succeeded", "failed"]
Number: TypeAlias = int | float
"""As it was sent: 5 stays 5. Of money in yuan."""


class TaskOptions(TypedDict, total=False):
    """Options of all kinds, by the names of the API; the gateway refuses those that a kind does not have."""

    model: str
    style: str
    scale: float
    noise: float
    steps: int
    high_fidelity: bool
    strong_inpaint: bool
    inpaint_strength: float
    prompt: str
    negative_prompt: str
    vector: bool
    colors: int
    fit: float


class Amount(Struct, frozen=True):
    """Prepaid uses and yuan."""

    count: int
    money: Number


class Cost(Struct, frozen=True):
    """Prepaid uses and yuan; `basis` is observed, estimated or unknown."""

    count: int = 0
    money: Number = 0
    basis: str = "unknown"


class Artifact(Struct, frozen=True):
    """A result."""

    name: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,31}\Z")]
    """Part of a file name, hence the narrow alphabet."""
    href: Annotated[str, Meta(pattern=r"^/(?!/)")]
    """A path on the gateway: the token must not be sent elsewhere."""
    url: str = ""
    """At the upstream, which may remove it."""


class TaskError(Struct, frozen=True):
    code: str
    detail: str = ""


class Task(Struct, frozen=True, kw_only=True):
    """A task: an image that the upstream has accepted."""

    id: Annotated[str, Meta(pattern=r"^[\w-]{1,500}\Z")]
    kind: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,31}\Z")]
    """As the id, part of a file name."""
    state: StateName
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None = None
    options: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    artifacts: tuple[Artifact, ...] = ()
    error: TaskError | None = None
    cost: Cost = Cost()

    @property
    def has_ended(self) -> bool:
        return self.state in {"succeeded", "failed"}

    def find_artifact(self, name: str | None = None) -> Artifact | None:
        """Return the result of this name, without one the main result: `vector` of vectorize, else `image`."""
        wanted = name or ("vector" if self.kind == "vectorize" else "image")
        found = next((artifact for artifact in self.artifacts if artifact.name == wanted), None)
        return found or (self.artifacts[0] if self.artifacts and name is None else None)


class SubmittedTask(Task, frozen=True, kw_only=True):
    """The task of a submission, which `is_replayed` if an earlier request under the same key was sent in its place."""

    idempotency_key: str
    is_replayed: bool = False


class TaskPage(Struct, frozen=True):
    """Tasks, newest first."""

    items: list[Task]
    next_cursor: str | None


class Policy(Struct, frozen=True):
    """A limit and its use; `unit` is tasks, money (yuan) or active (tasks at once)."""

    policy: str
    unit: str
    window: str | None
    limit: Number
    used: Number
    reserved: Number
    remaining: Number
    overrun: Number | None
    resets_at: datetime | None


class QuotaThreshold(Struct, frozen=True, kw_only=True):
    """A limit of which so much was used that you are told."""

    tenant: str
    policy: str
    unit: str
    window: str
    threshold: int
    """The share of the limit that was reached, in percent."""
    limit: Number
    used: Number
    reserved: Number
    remaining: Number
    resets_at: datetime | None


class Availability(Struct, frozen=True):
    """Whether an account can pay now, and if not, the time of the next check."""

    can_pay: bool
    look_again_at: datetime | None


class Quota(Struct, frozen=True):
    policies: list[Policy]
    account: Availability


class TaskLink(Struct, frozen=True):
    id: str
    state: str
    link: str


class Refund(Struct, frozen=True):
    refunded_at: datetime
    reason: str
    count: int
    money: Number


class Submission(Struct, frozen=True, kw_only=True):
    """A submission and its outcome: reserved, accepted, refused, not_sent or unknown."""

    id: str
    tenant: str | UnsetType | None = UNSET
    """Only operators get it, like `account`."""
    account: str | UnsetType | None = UNSET
    outcome: str
    kind: str
    created_at: datetime | None
    settled_at: datetime | None
    task: TaskLink | None
    cost: Cost | None
    balance_suggests: str | None
    """Of an unknown one: whether the account seems to have been charged for it."""
    refund: Refund | None


class Outcomes(Struct, frozen=True):
    """Submissions by outcome."""

    running: int
    succeeded: int
    failed: int
    unknown: int
    refused: int
    not_sent: int


class Charged(Struct, frozen=True):
    """Spending less refunds. The limits count the tasks and the money."""

    tasks: int
    money: Number
    count: int = 0
    """Prepaid uses; 0 if the gateway is older than 0.5 and does not report them."""


class TaskAmount(Struct, frozen=True):
    """A number of tasks, and yuan."""

    tasks: int
    money: Number


class Spending(Struct, frozen=True):
    """Spent, by basis."""

    observed: Amount
    estimated: Amount
    unknown: TaskAmount


class Refunded(Struct, frozen=True):
    tasks: int
    count: int
    money: Number


class UsageSum(Struct, frozen=True):
    tasks: Outcomes
    charged: Charged
    spent: Spending
    refunded: Refunded
    overrun: Number = 0
    """Of the money spent, what passed a limit; of several limits that passed the most."""


class UsageRow(UsageSum, frozen=True, kw_only=True):
    """Totals of a period: a day, a month or the whole interval."""

    period: str
    tenant: str | UnsetType | None = UNSET
    """Only operators get it, like `tenant_id`."""
    tenant_id: int | UnsetType | None = UNSET
    kind: str | None


class UnknownSubmission(Struct, frozen=True, kw_only=True):
    """A submission of unknown outcome."""

    id: str
    tenant: str | UnsetType = UNSET
    tenant_id: int | UnsetType = UNSET
    kind: str
    day: date


class RefundedSubmission(Struct, frozen=True, kw_only=True):
    submission: str
    tenant: str | UnsetType = UNSET
    tenant_id: int | UnsetType = UNSET
    kind: str
    day: date
    count: int
    money: Number
    reason: str
    refunded_at: datetime


class Usage(Struct, frozen=True, rename={"first": "from", "last": "to"}):
    """Usage from one day to another, inclusive, in UTC."""

    first: date
    last: date
    interval: str
    group_by: list[str]
    items: list[UsageRow]
    total: UsageSum
    unknown_submissions: list[UnknownSubmission]
    refunds: list[RefundedSubmission]
