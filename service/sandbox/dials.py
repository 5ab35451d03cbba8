"""The dials: how this upstream behaves, and what goes wrong with which requests.

`Dials` is the upstream's character, in force for every request until it is replaced:

| dial              | values                                    | what it changes                                      |
| ----------------- | ----------------------------------------- | ---------------------------------------------------- |
| `seconds`         | number, or null: as configured            | a task takes at least this long                      |
| `prices`          | yuan by kind                              | what a task costs once the prepaid uses are gone     |
| `charge`          | `submit`, `end`                           | when a task is charged; at the end only if completed |
| `checked_balance` | `now`, `then`                             | the figures of a finished task: today's, or its end's|
| `spelling`        | `Completed`, `COMPLETED`, `completed`     | letter case of every state                           |
| `colon`           | `:`, `：`                                 | in 任务提交失败:{reason}                             |
| `faults`          | list of faults                            | see below                                            |

A `Fault` says which requests it hits and what happens to them. Of all faults in the list, the first that matches a
request applies, alone: so a list is also a script ("the first is reset, the next two get a page of HTML").

| which requests | values                                      |                                                    |
| -------------- | ------------------------------------------- | -------------------------------------------------- |
| `on`           | `submit`, `check`, `file`, or null          | null: submits and checks                           |
| `user_key`     | text, or null: any                          | for a file, the key of the task's owner            |
| `times`        | number of requests, or null: for ever       | used up faults disappear from the list             |

| what happens | values                                        |                                                    |
| ------------ | --------------------------------------------- | -------------------------------------------------- |
| `latency`    | seconds                                       | passes before the request is looked at             |
| `reply`      | `json`                                        | the answer itself                                  |
|              | `hang`                                        | nothing is ever answered                           |
|              | `reset`                                       | TCP reset                                          |
|              | `page`                                        | a web server's page of HTML, mostly with `status`  |
|              | `cut`                                         | half the body that `Content-Length` promised       |
|              | `garbled`                                     | a whole body that is half the JSON                 |
| `when`       | `before`, `after`                             | `hang`, `reset` and `page` come before the request |
|              |                                               | is carried out, or after (charged, not answered)   |
| `status`     | HTTP status                                   | of whatever is answered                            |
| `refuse`     | text                                          | refused with this `err_msg`, word for word         |
| `reject`     | text                                          | submits only: 任务提交失败 for this reason         |
| `fail`       | text                                          | submits only: the task is accepted and ends Failed |
| `wrong`      | by field: `string`, `int`, `float`,           | the field comes with a wrong type or value         |
|              | `negative`, `null`, `missing`                 |                                                    |
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

Kind: TypeAlias = Literal["upscale", "vector", "face", "seamless"]
Operation: TypeAlias = Literal["submit", "check", "file"]
Reply: TypeAlias = Literal["json", "hang", "reset", "page", "cut", "garbled"]
Wrong: TypeAlias = Literal["string", "int", "float", "negative", "null", "missing"]
Field: TypeAlias = Literal[
    "err_code",
    "err_msg",
    "task_id",
    "status",
    "images_url",
    "vector_url",
    "grid_url",
    "remaining_count",
    "remaining_money",
]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=3600)]
Yuan: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]

PRICES: Final[dict[Kind, int]] = {"upscale": 3, "vector": 2, "face": 1, "seamless": 1}
"""What a task of each kind costs in yuan unless the dials say otherwise. The vendor publishes no prices."""


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What goes wrong, and with which requests; the module's docstring explains every field."""

    on: Operation | None = None
    user_key: str | None = None
    times: Annotated[int, msgspec.Meta(ge=1)] | None = None

    latency: Seconds = 0.0
    reply: Reply = "json"
    when: Literal["before", "after"] = "after"
    status: Annotated[int, msgspec.Meta(ge=200, le=599)] = 200
    refuse: str | None = None
    reject: str | None = None
    fail: str | None = None
    wrong: dict[Field, Wrong] = {}

    def __post_init__(self) -> None:
        """Refuse combinations that would silently do nothing.

        Raises:
            ValueError: with the reason; while decoding, msgspec turns it into a `ValidationError`.

        """
        if self.when == "before" and self.reply not in {"hang", "reset", "page"}:
            raise ValueError(f"`when: before` goes with hang, reset or page, not with {self.reply}")
        if self.on not in {"submit", None} and (self.reject is not None or self.fail is not None):
            raise ValueError("`reject` and `fail` are about submits")
        if self.on == "file" and (self.refuse is not None or self.wrong or self.reply == "garbled"):
            raise ValueError("`refuse`, `wrong` and `garbled` are about JSON, and a file has none")
        if self.on == "file" and self.status != 200 and self.reply != "page":
            raise ValueError("a file with another `status` is a `page`")

    def matches(self, operation: Operation, user_key: str) -> bool:
        """Say whether this fault is about such a request."""
        concerns = operation != "file" if self.on is None else operation == self.on
        return concerns and self.user_key in {None, user_key}


NO_FAULT: Final = Fault()


class Dials(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the upstream behaves; the module's docstring explains every dial."""

    seconds: Seconds | None = None
    prices: dict[Kind, Yuan] = {}
    charge: Literal["submit", "end"] = "submit"
    checked_balance: Literal["now", "then"] = "now"
    spelling: Literal["Completed", "COMPLETED", "completed"] = "Completed"
    colon: Literal[
        ":",
        "：",
    ] = ":"
    faults: tuple[Fault, ...] = ()

    def price(self, kind: Kind) -> int:
        """Give the price of a task in yuan."""
        return self.prices.get(kind, PRICES[kind])

    def spell(self, state: str) -> str:
        """Write a state in the letter case that is set."""
        if self.spelling == "COMPLETED":
            return state.upper()
        return state.lower() if self.spelling == "completed" else state.capitalize()

    def strike(self, operation: Operation, user_key: str) -> tuple[Fault, Dials]:
        """Give the fault that hits this request, and the dials as they are after it."""
        for place, fault in enumerate(self.faults):
            if not fault.matches(operation, user_key):
                continue
            if fault.times is None:
                return fault, self
            left = () if fault.times == 1 else (msgspec.structs.replace(fault, times=fault.times - 1),)
            faults = self.faults[:place] + left + self.faults[place + 1 :]
            return fault, msgspec.structs.replace(self, faults=faults)
        return NO_FAULT, self


class Panel:
    """Holds the dials in force.

    Attributes:
        dials: may be replaced at any time.

    """

    def __init__(self, dials: Dials) -> None:
        self.dials = dials

    def strike(self, operation: Operation, user_key: str) -> Fault:
        """Give the fault that hits this request, and count it."""
        fault, self.dials = self.dials.strike(operation, user_key)
        return fault
