"""Types of the ledger as they are stored in Redis, and how they are read."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import msgspec
from msgspec import Struct, field

from service.domain.errors import IdempotencyKeyInvalid
from service.domain.tasks import Cost, Kind, Options
from service.domain.tenants import AccountPolicy, TenantPolicy, Window

OFFSET_UNITS_PER_MS = 10
"""The offset is counted in so many parts of a millisecond: it loses one part in each millisecond."""


class ClockReading(Struct, frozen=True):
    """The same moment in the ledger's time (`now`) and in the server's (`wall`)."""

    ledger_ms: int
    server_ms: int

    @property
    def offset_ms(self) -> int:
        """By how many milliseconds the ledger's time is ahead."""
        return self.ledger_ms - self.server_ms


class LedgerClock(Struct, frozen=True):
    """The ledger's time when it was last read, and its offset then, in parts of a millisecond."""

    last_ms: int = 0
    offset_units: int = 0

    def advance(self, server_ms: int) -> LedgerClock:
        """The clock when the server's time is `wall`."""
        elapsed = server_ms - (self.last_ms - _to_ms(self.offset_units))
        offset = (
            max(self.offset_units - elapsed, 0) if elapsed >= 0 else (self.last_ms - server_ms) * OFFSET_UNITS_PER_MS
        )
        return LedgerClock(server_ms + _to_ms(offset), offset)


def _to_ms(offset_units: int) -> int:
    """An offset in milliseconds, rounded up, so that the ledger's time does not go back where the offset shrinks."""
    return -(-offset_units // OFFSET_UNITS_PER_MS)


UNIT_MONEY = "money"


UNIT_TASKS = "tasks"


MAX_ACTIVE_POLICY = "max-active"


class WindowCounter(Struct):
    """What a tenant used and holds in the window that began at `period`; `overrun` is what passed its limit.

    `name` tells it from an earlier counter of the same period, where the server's clock stepped back into that.
    """

    window_start: int = 0
    tasks: int = 0
    tasks_reserved: int = 0
    money_fen: int = 0
    money_reserved_fen: int = 0
    overrun_fen: int = 0
    replacement_key: int | None = None

    @property
    def key(self) -> int:
        """What reservations that were counted in it know it by."""
        return self.window_start if self.replacement_key is None else self.replacement_key


class TenantState(Struct):
    """The ledger's counters of one tenant: every window is counted, whether or not a limit stands on it.

    `active` counts what was reserved and has not ended, `kinds` the same by kind. `aside` keeps the counter of the last
    period, as the server's clock may step back into that, and of later periods where it has, until these come again;
    `names` counts those that got a name.
    """

    active_tasks: int = 0
    active_by_kind: dict[Kind, int] = field(default_factory=dict)
    windows: dict[Window, WindowCounter] = field(default_factory=dict)
    retained_counters: dict[Window, list[WindowCounter]] = field(default_factory=dict)
    replacement_key_seq: int = 0


def window_bounds(window: Window, now: int) -> tuple[int, int | None]:
    """When the calendar window around `now` began and when it ends, in UTC; `total` neither began nor ends."""
    if window is Window.TOTAL:
        return 0, None
    start = datetime.fromtimestamp(now // 1000, UTC).replace(second=0)
    if window is Window.MINUTE:
        end = start + timedelta(minutes=1)
    elif window is Window.HOUR:
        start = start.replace(minute=0)
        end = start + timedelta(hours=1)
    elif window is Window.DAY:
        start = start.replace(minute=0, hour=0)
        end = start + timedelta(days=1)
    else:
        start = start.replace(minute=0, hour=0, day=1)
        end = (start + timedelta(days=32)).replace(day=1)
    return int(start.timestamp()) * 1000, int(end.timestamp()) * 1000


def current_counter(state: TenantState, window: Window, now: int) -> WindowCounter:
    """The counter of the window around `now`, which what was counted in other periods is no part of."""
    period, _ = window_bounds(window, now)
    found = (each for each in _all_counters(state, window) if each.window_start == period)
    return next(found, WindowCounter(window_start=period))


def _all_counters(state: TenantState, window: Window) -> list[WindowCounter]:
    """The counters of a window: those that were set aside, then that of now."""
    now = state.windows.get(window)
    return [*state.retained_counters.get(window, []), *([now] if now else [])]


def policy_name(window: Window, unit: str) -> str:
    """What a policy is called in answers and metrics, such as `day-tasks`."""
    return f"{window}-{unit}"


def policy_names(policy: TenantPolicy) -> tuple[str, ...]:
    """The names of all limits of a tenant."""
    counted = ((limit.window, limit.tasks, limit.money_fen) for limit in policy.limits)
    names = [
        policy_name(window, unit)
        for window, tasks, money in counted
        for unit, most in ((UNIT_TASKS, tasks), (UNIT_MONEY, money))
        if most is not None
    ]
    return (*names, MAX_ACTIVE_POLICY) if policy.max_active is not None else tuple(names)


class RateLimit(Struct, frozen=True):
    """A limit on tasks in one window as headers tell it, in seconds: the window's length, and until it resets."""

    policy: str
    limit: int
    remaining: int
    window_seconds: int | None
    resets_in_seconds: int | None


def compute_rate_limits(policy: TenantPolicy, state: TenantState, now: int) -> tuple[RateLimit, ...]:
    """What is left of each limit on tasks at `now`."""
    found = []
    for limit in policy.limits:
        if limit.tasks is None:
            continue
        each, (start, end) = current_counter(state, limit.window, now), window_bounds(limit.window, now)
        left = compute_remaining(limit.tasks, each.tasks, each.tasks_reserved)
        name = policy_name(limit.window, UNIT_TASKS)
        if end is None:
            found.append(RateLimit(name, limit.tasks, left, None, None))
        else:
            found.append(RateLimit(name, limit.tasks, left, (end - start) // 1000, -((now - end) // 1000)))
    return tuple(found)


def compute_remaining(limit: int, used: int, reserved: int) -> int:
    """What is left of a limit, never below zero."""
    return max(limit - used - reserved, 0)


class AccountStatus(StrEnum):
    """Whether an account may be used."""

    OPEN = "open"
    EXHAUSTED = "exhausted"
    INVALID = "invalid"


class ReadingSource(StrEnum):
    """The call whose answer told a figure."""

    SUBMIT = "submit"
    CHECK = "check"


class InferredCharge(StrEnum):
    """What the balance suggests of a submission whose outcome is unknown."""

    CHARGED = "charged"
    NOT_CHARGED = "not-charged"


class Balance(Struct, frozen=True):
    """What one answer told of the balance; a missing or mistyped figure is None. Money is in fen."""

    count: int | None = None
    money_fen: int | None = None


class BalanceReading(Struct):
    """An observed figure: when its request was sent, when its answer was received, and which call it was."""

    value: int
    sent_at: int
    received_at: int
    source: ReadingSource


class BalanceSnapshot(Struct):
    """The figures known when a submission was reserved."""

    count: int
    money_fen: int


class ExpectedDrop(Struct):
    """The drop that the gateway's own submissions may yet cause, as far as it was not seen.

    Each of the `tasks` takes a use or money: at most `money` fen together, but for `unpriced` ones of no known limit.
    `taken` is the money that was put down to them so far.
    """

    charges: int = 0
    max_fen: int = 0
    unpriced: int = 0
    attributed_fen: int = 0


class ChargeInference(Struct):
    """A submission of unknown outcome that had the account to itself, with the figures known before it.

    `seq` is its number on the account, `since` when it became unknown. `suggests` is what was found out.
    """

    reservation: str
    submission_seq: int
    unknown_at: int
    count: int
    money_fen: int
    inferred_charge: InferredCharge | None = None


class FinishedTaskCheck(Struct):
    """The finished task that was checked last: when that check was sent, and what it told."""

    reservation: str
    sent_at: int
    count: int
    money_fen: int


class AccountState(Struct):
    """The ledger's knowledge of one account.

    `open` counts submissions that were reserved and have not ended, `sending` those not yet settled. `seq` numbers the
    reservations, so that a receipt can tell whether anything else happened on the account in the meantime. `closed` is
    when the request was sent whose refusal closed the account, `reopened` when an operator had it looked at again: what
    was sent before says nothing any more. `charged_late` says that a submit was seen to leave the balance as it was,
    so that accepted tasks are not in the figures before they end; None until it was seen either way. `rose` is when a
    figure was first known, or last seen to rise.

    `uncharged` counts the open submissions that may not be in the known figures yet, `thrifty` those of them that must
    not take money; `astray` counts those that ended without telling figures, or whose outcome is unknown: what is asked
    for from `astray_until` on shows them, as was last seen at `caught_up`. `expected` tells a drop that is the
    gateway's own from one that is not; the latter adds up in `unexplained_count` and `unexplained_money`. `unknown`
    counts the submissions of unknown outcome. `looks` says that re-checking a finished task, which costs nothing, was
    seen to tell the balance of now; `looked` is when the account was last closed or looked at, `in_vain` how
    many looks told nothing since one did. `prices` are the last that were paid in money, by kind, `highest` the
    highest.
    """

    status: AccountStatus = AccountStatus.OPEN
    next_probe_at: int = 0
    closed_at: int = 0
    reopened_at: int = 0
    charges_on_completion: bool | None = None
    count: BalanceReading | None = None
    money: BalanceReading | None = None
    last_increase_at: int = 0
    open_submissions: int = 0
    unsettled: int = 0
    submission_seq: int = 0
    pending_charges: int = 0
    pending_prepaid_only: int = 0
    untracked_charges: int = 0
    untracked_until: int = 0
    reconciled_at: int = 0
    expected_drop: ExpectedDrop = field(default_factory=ExpectedDrop)
    unexplained_count: int = 0
    unexplained_money_fen: int = 0
    unknown_outcomes: int = 0
    pending_inference: ChargeInference | None = None
    live_balance_checks: bool = False
    last_balance_check_at: int = 0
    failed_balance_checks: int = 0
    last_finished_task: FinishedTaskCheck | None = None
    last_price: dict[Kind, int] = field(default_factory=dict)
    max_observed_price: dict[Kind, int] = field(default_factory=dict)

    @property
    def unaccounted_charges(self) -> int:
        """How many submissions the figures may lack."""
        return self.pending_charges + self.untracked_charges

    def to_server_time(self, offset_ms: int) -> AccountState:
        """The same with all times earlier by so many milliseconds; 0 stands for never, and stays so."""

        def figure(known: BalanceReading | None) -> BalanceReading | None:
            moves = {"sent_at", "received_at"}
            return known and msgspec.structs.replace(known, **{each: earlier(getattr(known, each)) for each in moves})

        def earlier(at: int) -> int:
            return at and max(at - offset_ms, 1)

        moves = (
            "next_probe_at",
            "closed_at",
            "reopened_at",
            "last_increase_at",
            "untracked_until",
            "reconciled_at",
            "last_balance_check_at",
        )
        return msgspec.structs.replace(
            self,
            **{each: earlier(getattr(self, each)) for each in moves},
            count=figure(self.count),
            money=figure(self.money),
            pending_inference=self.pending_inference
            and msgspec.structs.replace(self.pending_inference, unknown_at=earlier(self.pending_inference.unknown_at)),
            last_finished_task=self.last_finished_task
            and msgspec.structs.replace(self.last_finished_task, sent_at=earlier(self.last_finished_task.sent_at)),
        )


class ReservationState(StrEnum):
    """What became of a reservation. `reserved` is open, `unknown` provisional, the others are final."""

    RESERVED = "reserved"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    NOT_SENT = "not-sent"
    UNKNOWN = "unknown"


class Idempotency(Struct, frozen=True):
    """What makes a repeated submission known: digests of the key and of the content it was first sent with."""

    key_digest: str
    content_digest: str


class Refund(Struct):
    """What an operator gave back to the tenant's windows, when (ms) and why."""

    refunded_at: int
    reason: str
    count: int
    money_fen: int


class Reservation(Struct):
    """A place held in the windows of a tenant and on an account, until `lease`.

    `sent` is when it was last aimed at an account; `before` what was known of that account then, `alone` whether
    nothing else was open on it, `clean` whether those figures lacked nothing, `seq` its number there. `use` says
    whether it was to take a prepaid use, or money (None where nobody knew). It `owes` while it may not be in the
    figures, and is `thrifty` while it is under way and must not take money.

    `settled` is when it got its outcome. `cost` is what its task took and `succeeded` how it went, known once that has
    ended. `key` is the digest of its idempotency key. Of an unknown outcome `suggests` says what the balance suggests.
    A `refund` makes it count for nothing in the windows, whatever else becomes of it. `periods` are the keys of the
    counters it was counted in.
    """

    state: ReservationState
    tenant: int
    account: int
    kind: Kind
    created_at: int
    dispatched_at: int
    lease_expires_at: int
    submission_seq: int = 0
    exclusive: bool = False
    balance_exact: bool = False
    expects_prepaid: bool | None = None
    charge_pending: bool = False
    prepaid_only: bool = False
    settled_at: int = 0
    balance_before: BalanceSnapshot | None = None
    balance_after: Balance | None = None
    cost: Cost | None = None
    succeeded: bool | None = None
    key_digest: str | None = None
    inferred_charge: InferredCharge | None = None
    refund: Refund | None = None
    window_starts: dict[Window, int] = field(default_factory=dict)
    money_holds: dict[Window, int] = field(default_factory=dict)

    def to_server_time(self, offset_ms: int) -> Reservation:
        """The same with all times of the ledger earlier by so many milliseconds; 0 stands for never, and stays so."""
        moves = {each: getattr(self, each) for each in ("dispatched_at", "lease_expires_at", "settled_at")}
        earlier = {each: at and max(at - offset_ms, 1) for each, at in moves.items()}
        return msgspec.structs.replace(self, **earlier)


class Violation(Struct, frozen=True):
    """A policy that refused: its name, its limit, and when it resets (None if it never does by itself)."""

    policy: str
    limit: int
    resets_at: int | None


class Candidate(Struct):
    """An account that a submission may use; `probes` if that is to find out whether it can pay."""

    id: int
    policy: AccountPolicy
    state: AccountState
    is_probe: bool = False


class Grant(Struct, frozen=True):
    """A place is held on `account` until `lease`; both times are the server's, as in all verdicts."""

    account: int
    now: int
    lease_expires_at: int


class PolicyDenial(Struct, frozen=True):
    """Policies of the tenant refused."""

    violations: tuple[Violation, ...]
    now: int


class NoAccount(Struct, frozen=True):
    """No account can take it: all are exhausted until `look_at`, or (if None) none is valid."""

    retry_at: int | None
    now: int


class Replay(Struct, frozen=True):
    """It was submitted before under the same idempotency key: `reservation` became a task, or is unknown."""

    reservation: str
    state: ReservationState
    now: int


class InFlight(Struct, frozen=True):
    """It was submitted before under the same idempotency key, and nobody knows yet what became of it."""

    now: int


class KeyReuse(Struct, frozen=True):
    """Something else was submitted before under the same idempotency key."""

    now: int


Verdict = Grant | PolicyDenial | NoAccount | Replay | InFlight | KeyReuse


class RefundResult(StrEnum):
    """What became of a wish to refund a submission."""

    REFUNDED = "refunded"
    ALREADY_REFUNDED = "already-refunded"
    """It was refunded before."""
    RUNNING = "running"
    """It has not ended, so that nobody knows yet what it costs."""
    NOTHING_CHARGED = "nothing-charged"
    """It cost nothing."""


class Measure(StrEnum):
    """What is counted of each kind: submissions by outcome, then what they took by the basis it is known on."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNKNOWN = "unknown"
    REFUSED = "refused"
    NOT_SENT = "not-sent"
    OBSERVED_COUNT = "observed-count"
    OBSERVED_MONEY = "observed-money"
    ESTIMATED_COUNT = "estimated-count"
    ESTIMATED_MONEY = "estimated-money"
    UNKNOWN_COST = "unknown-cost"
    """Ended tasks of which nobody knows what they took."""
    UNKNOWN_MONEY = "unknown-money"
    """What submissions of unknown outcome are charged for."""
    REFUNDED = "refunded"
    REFUNDED_COUNT = "refunded-count"
    REFUNDED_MONEY = "refunded-money"


Tally = Counter[Measure]


class DayUsage(Struct):
    """One day of one tenant: the tally of each kind, and by reservation those that are unknown or were refunded."""

    tallies: dict[Kind, Tally] = field(default_factory=dict)
    unknown: dict[str, Kind] = field(default_factory=dict)
    refunds: dict[str, tuple[Kind, Refund]] = field(default_factory=dict)


def count_charged_tasks(tally: Tally) -> int:
    """How many submissions the tenant's windows count."""
    return (
        tally[Measure.RUNNING]
        + tally[Measure.SUCCEEDED]
        + tally[Measure.FAILED]
        + tally[Measure.UNKNOWN]
        - tally[Measure.REFUNDED]
    )


def sum_charged_fen(tally: Tally) -> int:
    """How much money the tenant's windows count."""
    return (
        tally[Measure.OBSERVED_MONEY]
        + tally[Measure.ESTIMATED_MONEY]
        + tally[Measure.UNKNOWN_MONEY]
        - tally[Measure.REFUNDED_MONEY]
    )


MAX_IDEMPOTENCY_KEY_CHARS = 255


_DIGEST_CHARS = 32


_QUOTED_KEY = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')


_BARE_KEY = re.compile(r"[!#-+\--:<-\[\]-~]+")
"""Visible ASCII, but for what would make it more than one plain string: quotes, backslashes, commas and semicolons."""


def parse_idempotency_key(values: Sequence[str]) -> str | None:
    """The key that the header was given with; None without one. Raises IdempotencyKeyInvalid."""
    if not values:
        return None
    if len(values) > 1:
        raise IdempotencyKeyInvalid("Send one Idempotency-Key only.")
    text = values[0].strip(" \t")
    quoted = _QUOTED_KEY.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if not key or not (quoted or _BARE_KEY.fullmatch(text)):
        raise IdempotencyKeyInvalid(
            'An Idempotency-Key is one string of visible ASCII, best in quotes: "a-uuid-or-so". Nothing may follow it; '
            "without quotes it can't hold spaces, commas, semicolons or backslashes."
        )
    if len(key) > MAX_IDEMPOTENCY_KEY_CHARS:
        raise IdempotencyKeyInvalid(f"An Idempotency-Key has at most {MAX_IDEMPOTENCY_KEY_CHARS} characters.")
    return key


def digest_submission(
    key: str, options: Options, metadata: Mapping[str, str], image_sha256: bytes, webhook_url: str | None = None
) -> Idempotency:
    """The digests under which a submission is known: its content is its kind, every field, and the image's bytes.

    A field that is left out is the same as one with its default. Keys are kept across upgrades, so the digests must not
    change with one: an option that is added leaves those of all who do not use it as they were. So does `webhook`, the
    address that was given for this task.
    """
    content: tuple[object, ...] = (options.kind, _non_default_options(options), sorted(metadata.items()), image_sha256)
    if webhook_url is not None:
        content += (webhook_url,)
    return Idempotency(_short_digest(key.encode()), _short_digest(msgspec.msgpack.encode(content)))


def _non_default_options(options: Options) -> Sequence[tuple[str, object]]:
    """The options that are not at their defaults, by name."""
    chosen = []
    for option in msgspec.structs.fields(options):
        value = getattr(options, option.name)
        if value != option.default:
            chosen.append((option.name, value or 0))  # -0.0 is the number 0.0, but is written differently
    return sorted(chosen)


def _short_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARS]
