"""Types of the ledger as Redis stores them, and functions that read them.

Times are milliseconds. Times of accounts, leases and settlements are ledger time (it never goes back); windows, refunds
and `created_at` are server time (the clock of Redis). Money is in fen.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from operator import mul

import msgspec
from msgspec import Struct, field

from service.domain.errors import IdempotencyKeyInvalid, RateLimit, Violation
from service.domain.tasks import Cost, Kind, Options
from service.domain.tenants import AccountPolicy, TenantPolicy, Window

OFFSET_UNITS_PER_MS = 10
"""The offset shrinks by one unit per millisecond of server time: ledger time runs at 90 % until it is 0."""


class ClockReading(Struct, frozen=True):
    """One moment in ledger time and in server time."""

    ledger_ms: int
    server_ms: int

    @property
    def offset_ms(self) -> int:
        return self.ledger_ms - self.server_ms


class LedgerClock(Struct, frozen=True):
    """The ledger time at the last reading, and how far it was ahead of server time then."""

    last_ms: int = 0
    offset_units: int = 0

    def advance(self, server_ms: int) -> LedgerClock:
        elapsed = server_ms - (self.last_ms - _to_ms(self.offset_units))
        offset = self.offset_units - elapsed if elapsed >= 0 else (self.last_ms - server_ms) * OFFSET_UNITS_PER_MS
        offset = max(offset, 0)
        return LedgerClock(server_ms + _to_ms(offset), offset)


def _to_ms(offset_units: int) -> int:
    # Rounded up, so that ledger time does not go back where the offset shrinks.
    return -(-offset_units // OFFSET_UNITS_PER_MS)


UNIT_MONEY = "money"
UNIT_TASKS = "tasks"
READS_POLICY = "second-reads"
"""Name of the limit on reads, which is counted by each process and not in the ledger."""
MAX_ACTIVE_POLICY = "max-active"


class WindowCounter(Struct):
    """Use of one tenant in one calendar window; `overrun_fen` is the money spent beyond its limit.

    `replacement_key` is set where the server clock stepped back into a window whose former counter is gone.
    """

    window_start: int = 0
    tasks: int = 0
    tasks_reserved: int = 0
    money_fen: int = 0
    money_reserved_fen: int = 0
    overrun_fen: int = 0
    replacement_key: int | None = None


class TenantState(Struct):
    """Counters of one tenant. Every window is counted, with or without a limit, so that a later limit starts right.

    `active_tasks` are reserved or accepted and have not ended. `retained_counters` holds the previous window, and later
    ones after the server clock stepped back, until they become current again.
    """

    active_tasks: int = 0
    active_by_kind: dict[Kind, int] = field(default_factory=dict)
    windows: dict[Window, WindowCounter] = field(default_factory=dict)
    retained_counters: dict[Window, list[WindowCounter]] = field(default_factory=dict)
    replacement_key_seq: int = 0


@lru_cache(32)  # a report takes the windows of all tenants at one time
def window_bounds(window: Window, now: int) -> tuple[int, int | None]:
    """Return start and end of the calendar window (UTC) around `now`; `total` starts at 0 and has no end."""
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
    """Return the counter of the window around `now`, or a new one."""
    start, _ = window_bounds(window, now)
    for counter in state.retained_counters.get(window, ()):
        if counter.window_start == start:
            return counter
    current = state.windows.get(window)
    return current if current and current.window_start == start else WindowCounter(window_start=start)


def all_counters(state: TenantState, window: Window) -> list[WindowCounter]:
    current = state.windows.get(window)
    return [*state.retained_counters.get(window, []), *([current] if current else [])]


def policy_name(window: Window, unit: str) -> str:
    """Return the public name of a policy, such as `day-tasks`."""
    return f"{window}-{unit}"


def policy_names(policy: TenantPolicy) -> Sequence[str]:
    names = []
    for limit in policy.limits:
        if limit.tasks is not None:
            names.append(policy_name(limit.window, UNIT_TASKS))
        if limit.money_fen is not None:
            names.append(policy_name(limit.window, UNIT_MONEY))
    return names if policy.max_active is None else [*names, MAX_ACTIVE_POLICY]


def compute_rate_limits(policy: TenantPolicy, state: TenantState, now: int) -> tuple[RateLimit, ...]:
    rate_limits = []
    for limit in policy.limits:
        if limit.tasks is None:
            continue
        counter, (start, end) = current_counter(state, limit.window, now), window_bounds(limit.window, now)
        remaining = compute_remaining(limit.tasks, counter.tasks, counter.tasks_reserved)
        seconds = (None, None) if end is None else ((end - start) // 1000, -((now - end) // 1000))
        rate_limits.append(RateLimit(policy_name(limit.window, UNIT_TASKS), limit.tasks, remaining, *seconds))
    return tuple(rate_limits)


def compute_remaining(limit: int, used: int, reserved: int) -> int:
    return max(limit - used - reserved, 0)


class AccountStatus(StrEnum):
    OPEN = "open"
    EXHAUSTED = "exhausted"
    INVALID = "invalid"


class ReadingSource(StrEnum):
    """The call whose response carried a reading."""

    SUBMIT = "submit"
    CHECK = "check"


class InferredCharge(StrEnum):
    """Inference from the balance for a submission of unknown outcome."""

    CHARGED = "charged"
    NOT_CHARGED = "not-charged"


class Balance(Struct, frozen=True):
    """The figures of one response; None where a figure is missing or invalid."""

    count: int | None = None
    money_fen: int | None = None


class BalanceReading(Struct):
    """One figure with the times of its request and its response."""

    value: int
    sent_at: int
    received_at: int
    source: ReadingSource


class BalanceSnapshot(Struct):
    """The balance known when a submission was reserved."""

    count: int
    money_fen: int


class ExpectedDrop(Struct):
    """The drop that submissions of the gateway may still cause.

    Each of `charges` takes a prepaid use or money: together at most `max_fen`, apart from `unpriced` ones without a
    known maximum. `attributed_fen` is the money already attributed to them.
    """

    charges: int = 0
    max_fen: int = 0
    unpriced: int = 0
    attributed_fen: int = 0


class ChargeInference(Struct):
    """A submission of unknown outcome that was alone on its account, with the balance before it."""

    reservation: str
    submission_seq: int
    unknown_at: int
    count: int
    money_fen: int
    inferred_charge: InferredCharge | None = None


class FinishedTaskCheck(Struct):
    """The latest check of a finished task; checking it again may read the balance at no cost."""

    reservation: str
    sent_at: int
    count: int
    money_fen: int


class AccountState(Struct):
    """The ledger's knowledge of one account.

    closed_at                 when the request was sent whose refusal closed the account
    reopened_at               older readings and refusals count for nothing any more
    charges_on_completion     whether the vendor charges at the end of a task; None until observed
    last_increase_at          when a figure became known or rose; older requests explain no drop
    unsettled                 reservations without an outcome
    submission_seq            number of the latest submission, to detect others in between
    pending_charges           open submissions that the balance may not include yet
    pending_prepaid_only      those of them that must not take money
    untracked_charges         ended or unknown submissions that the balance may not include;
                              requests sent from `untracked_until` on include them (reconciled_at)
    live_balance_checks       whether checks of a finished task return the current balance
    failed_balance_checks     balance checks without a result since the last one that had one
    last_price                last observed price by kind, in fen (max_observed_price: the highest)
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
        """Submissions that the known balance may not include."""
        return self.pending_charges + self.untracked_charges

    def to_server_time(self, offset_ms: int) -> AccountState:
        """Return a copy with all times moved back by the offset; 0 means never and stays 0."""

        def shift_reading(reading: BalanceReading | None) -> BalanceReading | None:
            return reading and msgspec.structs.replace(
                reading, sent_at=shift(reading.sent_at), received_at=shift(reading.received_at)
            )

        def shift(at: int) -> int:
            return at and max(at - offset_ms, 1)

        times = (
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
            **{name: shift(getattr(self, name)) for name in times},
            count=shift_reading(self.count),
            money=shift_reading(self.money),
            pending_inference=self.pending_inference
            and msgspec.structs.replace(self.pending_inference, unknown_at=shift(self.pending_inference.unknown_at)),
            last_finished_task=self.last_finished_task
            and msgspec.structs.replace(self.last_finished_task, sent_at=shift(self.last_finished_task.sent_at)),
        )


class ReservationState(StrEnum):
    """State of a reservation: `unknown` is provisional, all after `reserved` but it are final."""

    RESERVED = "reserved"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    NOT_SENT = "not-sent"
    UNKNOWN = "unknown"


class Idempotency(Struct, frozen=True):
    """Digests that identify a repeated submission.

    `source_digest` is of the content with the URL of the image in place of its bytes, empty without a URL: it is known
    before the image is fetched.
    """

    key_digest: str
    content_digest: str
    source_digest: str = ""


class Refund(Struct):
    """An operator's refund to the tenant's windows."""

    refunded_at: int
    reason: str
    count: int
    money_fen: int


class Reservation(Struct):
    """A place in the windows of a tenant and on an account.

    dispatched_at             when it was assigned to its account, before sending
    exclusive                 no other submission was open on the account
    balance_exact             the balance then included every charge (balance_before)
    expects_prepaid           whether it takes a prepaid use (or money); None if unknown
    charge_pending            the known balance may not include its charge
    prepaid_only              it is open and must not take money
    succeeded, cost           result of its task, None until that ended
    overrun_fen               the most by which the cost passed a limit on money
    window_starts             keys of the counters it is counted in
    money_holds               money held in each window, in fen
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
    overrun_fen: int = 0
    key_digest: str | None = None
    inferred_charge: InferredCharge | None = None
    refund: Refund | None = None
    window_starts: dict[Window, int] = field(default_factory=dict)
    money_holds: dict[Window, int] = field(default_factory=dict)

    def to_server_time(self, offset_ms: int) -> Reservation:
        """Return a copy with all ledger times moved back by the offset; 0 means never and stays 0."""
        times = {name: getattr(self, name) for name in ("dispatched_at", "lease_expires_at", "settled_at")}
        return msgspec.structs.replace(self, **{name: at and max(at - offset_ms, 1) for name, at in times.items()})


class Candidate(Struct):
    """An account that a submission may use; a probe finds out whether an exhausted one can pay again."""

    id: int
    policy: AccountPolicy
    state: AccountState
    is_probe: bool = False


class Grant(Struct, frozen=True):
    """A place is held on `account`. Times of verdicts are server time."""

    account: int
    now: int
    lease_expires_at: int


class PolicyDenial(Struct, frozen=True):
    """Policies of the tenant refused."""

    violations: tuple[Violation, ...]
    now: int


class NoAccount(Struct, frozen=True):
    """No account can take the submission; `retry_at` is None if none is valid."""

    retry_at: int | None
    now: int


class Replay(Struct, frozen=True):
    """An earlier submission under the same idempotency key became a task, or is unknown."""

    reservation: str
    state: ReservationState
    now: int


class InFlight(Struct, frozen=True):
    """An earlier submission under the same idempotency key has no outcome yet."""

    now: int


class KeyReuse(Struct, frozen=True):
    """The idempotency key was used for other content."""

    now: int


Verdict = Grant | PolicyDenial | NoAccount | Replay | InFlight | KeyReuse


class RefundResult(StrEnum):
    REFUNDED = "refunded"
    ALREADY_REFUNDED = "already-refunded"
    RUNNING = "running"
    """The task has not ended, so its cost is unknown."""
    NOTHING_CHARGED = "nothing-charged"


class Measure(StrEnum):
    """A number of the usage: submissions by outcome, then costs by their basis."""

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
    """Ended tasks of unknown cost."""
    UNKNOWN_MONEY = "unknown-money"
    """Money charged for submissions of unknown outcome."""
    OVERRUN_MONEY = "overrun-money"
    """Money beyond limits, by the limit that each cost passed the most."""
    REFUNDED = "refunded"
    REFUNDED_COUNT = "refunded-count"
    REFUNDED_MONEY = "refunded-money"


Tally = Counter[Measure]


class DayUsage(Struct):
    """Usage of a tenant on one UTC day. A submission counts on the day of its reservation, as in the windows."""

    tallies: dict[Kind, Tally] = field(default_factory=dict)
    unknown: dict[str, Kind] = field(default_factory=dict)
    refunds: dict[str, tuple[Kind, Refund]] = field(default_factory=dict)


SPENT_WINDOWS = (Window.DAY, Window.MONTH, Window.TOTAL)
SpentSums = tuple[int, ...]
"""What the usage of a tenant charges for one kind, for the metrics.

Start, uses and fen of each of SPENT_WINDOWS, as it was when they last changed.
"""


def spent_starts(now: int) -> Sequence[int]:
    """Return the starts of SPENT_WINDOWS around `now`."""
    return [window_bounds(window, now)[0] for window in SPENT_WINDOWS]


def current_spent(sums: SpentSums, starts: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Return the uses, and the fen, of those of SPENT_WINDOWS that begin at `starts`."""
    uses, fen = sums[1::3], sums[2::3]
    if sums[0] == starts[0]:  # all changed last on this day
        return uses, fen
    factors = [int(start == changed_in) for start, changed_in in zip(starts, sums[::3], strict=True)]
    return [*map(mul, uses, factors)], [*map(mul, fen, factors)]


def count_charged_tasks(tally: Tally) -> int:
    charged = (Measure.RUNNING, Measure.SUCCEEDED, Measure.FAILED, Measure.UNKNOWN)
    return sum(tally[measure] for measure in charged) - tally[Measure.REFUNDED]


def sum_charged_uses(tally: Tally) -> int:
    return tally[Measure.OBSERVED_COUNT] + tally[Measure.ESTIMATED_COUNT] - tally[Measure.REFUNDED_COUNT]


def sum_charged_fen(tally: Tally) -> int:
    charged = (Measure.OBSERVED_MONEY, Measure.ESTIMATED_MONEY, Measure.UNKNOWN_MONEY)
    return sum(tally[measure] for measure in charged) - tally[Measure.REFUNDED_MONEY]


MAX_IDEMPOTENCY_KEY_CHARS = 255
_DIGEST_CHARS = 32
_QUOTED_CHAR, _BARE_CHAR = r'([ !#-\[\]-~]|\\["\\])', r"[!#-+\--:<-\[\]-~]"
_QUOTED_KEY, _BARE_KEY = re.compile(f'"({_QUOTED_CHAR}*)"'), re.compile(f"{_BARE_CHAR}+")
"""Visible ASCII without quotes, backslashes, commas and semicolons: one plain string."""
IDEMPOTENCY_KEY_PATTERN = (
    f'^("{_QUOTED_CHAR}{{1,{MAX_IDEMPOTENCY_KEY_CHARS}}}"|{_BARE_CHAR}{{1,{MAX_IDEMPOTENCY_KEY_CHARS}}})$'
)
MAX_IDEMPOTENCY_HEADER_CHARS = 2 * MAX_IDEMPOTENCY_KEY_CHARS + len('""')
"""A valid header, for the OpenAPI document, and its length if each character of the key is escaped."""


def parse_idempotency_key(values: Sequence[str]) -> str | None:
    """Parse the header: a string of RFC 8941, or the same without quotes, as most clients send it.

    Returns None without a header. Raises IdempotencyKeyInvalid.
    """
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
    key: str,
    options: Options,
    metadata: Mapping[str, str],
    image_sha256: bytes,
    webhook_url: str | None = None,
    image_url: str | None = None,
) -> Idempotency:
    """Digest the key and the content: kind, options that differ from their defaults, metadata and image.

    Keys outlive upgrades, so a digest must not change with one: a new option, or no `webhook_url`, leaves it as it was.
    """
    changed_options = [
        (option.name, getattr(options, option.name) or 0)  # -0.0 is the number 0.0, but is written differently
        for option in msgspec.structs.fields(options)
        if getattr(options, option.name) != option.default
    ]

    def digest_content(image: bytes) -> str:
        content: tuple[object, ...] = (options.kind, sorted(changed_options), sorted(metadata.items()), image)
        if webhook_url is not None:
            content += (webhook_url,)
        return _short_digest(msgspec.msgpack.encode(content))

    source_digest = "" if image_url is None else digest_content(image_url.encode())
    return Idempotency(_short_digest(key.encode()), digest_content(image_sha256), source_digest)


def _short_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARS]
