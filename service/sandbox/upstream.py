"""What the vendor's calls do: take a task in, tell its state, hand out its files."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias

from msgspec import UNSET

from service.sandbox.accounts import Balance
from service.sandbox.asgi import ClientLeftError, Exchange
from service.sandbox.delivery import deliver, deliver_file, withhold
from service.sandbox.dials import Fault, Kind, Panel
from service.sandbox.forms import FILE, Form, RejectedError, parse_options, read_form
from service.sandbox.journal import Journal, Received
from service.sandbox.store import Store, Task, new_task_id
from service.sandbox.wire import NO_BALANCE, UNKNOWN_ACCOUNT, UNKNOWN_TASK, Answer, refusal, rejected
from service.sandbox.workshop import Workshop

FILES: Final = "/files/"


class RefusedError(Exception):
    """A call that is answered with an error; the text is the vendor's message."""


_Deed: TypeAlias = Callable[[Exchange, Form, Fault, Received], Awaitable[Answer]]


class Upstream:
    """The vendor's side of the sandbox."""

    def __init__(
        self,
        store: Store,
        workshop: Workshop,
        journal: Journal,
        closing: asyncio.Event,
        panel: Panel,
        seconds: float,
    ) -> None:
        """Bind the calls to what they work on.

        Args:
            store: accounts and tasks.
            workshop: works on the tasks.
            journal: is told of every request.
            closing: set when no request may wait any longer.
            panel: how to behave.
            seconds: that a task takes at least, where the dials don't say.

        """
        self._store = store
        self._workshop = workshop
        self._journal = journal
        self._closing = closing
        self._seconds = seconds
        self._panel = panel

    async def submit(self, kind: Kind, exchange: Exchange) -> None:
        """Answer one of the four submits."""
        await self._call(Received(operation="submit", path=exchange.path), exchange, partial(self._accept, kind))

    async def check(self, exchange: Exchange) -> None:
        """Answer a check of a task."""
        await self._call(Received(operation="check", path=exchange.path), exchange, self._tell)

    async def file(self, exchange: Exchange) -> None:
        """Hand out a result."""
        task_id, _, name = exchange.path.removeprefix(FILES).partition("/")
        task = self._store.task(task_id)
        if task is None or name not in task.files:
            await exchange.respond(404, "text/plain; charset=utf-8", b"no such file\n")
            return
        entry = Received(operation="file", path=exchange.path, user_key=task.user_key, task_id=task_id)
        fault = self._strike(entry)
        if not await self._begins(exchange, fault, entry):
            return
        self._journal.update(entry, "served")
        if fault.reply in {"json", "cut"}:
            await deliver_file(exchange, self._store.folder_of(task_id) / name, fault)
        else:
            await withhold(exchange, fault)

    async def _call(self, entry: Received, exchange: Exchange, deed: _Deed) -> None:
        try:
            form = await read_form(exchange.header("content-type"), exchange.body())
        except ClientLeftError:
            self._journal.add(entry)
            self._journal.update(entry, "broken_off")
            return
        entry.user_key = form.fields.pop("user_key", "")
        entry.fields = form.fields
        entry.image_bytes = len(form.image or b"")
        fault = self._strike(entry)
        if not await self._begins(exchange, fault, entry):
            return
        try:
            answer = await deed(exchange, form, fault, entry)
        except RefusedError as error:
            self._journal.update(entry, "refused", str(error))
            answer = refusal(str(error))
        await deliver(exchange, answer, fault)

    def _strike(self, entry: Received) -> Fault:
        fault = self._panel.strike(entry.operation, entry.user_key)
        entry.reply = fault.reply
        self._journal.add(entry)
        return fault

    async def _begins(self, exchange: Exchange, fault: Fault, entry: Received) -> bool:
        """Wait as the fault says, and say whether the request is to be carried out.

        It is even if its client has left meanwhile: a server that is slow does not notice.
        """
        if fault.latency > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), fault.latency)
                await exchange.gone()
                return False
        if fault.when == "before":
            self._journal.update(entry, "not_reached")
            await withhold(exchange, fault)
            return False
        return True

    async def _accept(self, kind: Kind, _: Exchange, form: Form, fault: Fault, entry: Received) -> Answer:
        self._account(entry.user_key, fault)
        task_id = new_task_id()
        try:
            if fault.reject is not None:
                raise RejectedError(fault.reject)
            if form.fault is not None:
                raise RejectedError(form.fault)
            options = parse_options(kind, form.fields)
            if form.image is None:
                raise RejectedError(f"缺少参数{FILE}")
            await self._workshop.take_in(task_id, form.image)
        except RejectedError as error:
            raise RefusedError(rejected(str(error), self._panel.dials.colon)) from None
        # From here to the transaction nothing is awaited: no other submit can spend the same balance.
        balance = self._account(entry.user_key, fault)
        paid = balance.pay(self._panel.dials.price(kind))
        if paid is None:
            await self._workshop.throw_away(task_id)
            raise RefusedError(NO_BALANCE)
        charged = self._panel.dials.charge == "submit"
        seconds = self._seconds if self._panel.dials.seconds is None else self._panel.dials.seconds
        task = Task(
            id=task_id,
            user_key=entry.user_key,
            kind=kind,
            options=options,
            ready=time.time() + seconds,
            charged=charged,
            doomed=fault.fail,
        )
        left = paid if charged else balance
        self._store.accept(task, left)
        self._workshop.start(task)
        entry.task_id = task_id
        self._journal.update(entry, "accepted")
        return Answer(task_id=task_id, remaining_count=left.count, remaining_money=left.money)

    async def _tell(self, exchange: Exchange, form: Form, fault: Fault, entry: Received) -> Answer:
        balance = self._account(entry.user_key, fault)
        entry.task_id = form.fields.get("task_id", "")
        task = self._store.task(entry.task_id)
        if task is None or task.user_key != entry.user_key:
            raise RefusedError(UNKNOWN_TASK)
        detail, word = task.reason or "", str(task.state)
        if task.state == "open":
            word = "processing" if self._workshop.started(task.id) else "pending"
        status = self._panel.dials.spell(word)
        self._journal.update(entry, "told", f"{status}: {detail}" if detail else status)
        if task.state != "completed":
            return Answer(status=status)
        if self._panel.dials.checked_balance == "then" and task.balance is not None:
            balance = task.balance
        found = {name: f"{exchange.base_url}{FILES}{task.id}/{name}" for name in task.files}
        return Answer(
            status=status,
            images_url=found.get("image.png", UNSET),
            vector_url=found.get("vector.svg", UNSET),
            grid_url=found.get("grid.png", UNSET),
            remaining_count=balance.count,
            remaining_money=balance.money,
        )

    def _account(self, user_key: str, fault: Fault) -> Balance:
        balance = self._store.balance(user_key)
        if balance is None:
            raise RefusedError(UNKNOWN_ACCOUNT)
        if fault.refuse is not None:
            raise RefusedError(fault.refuse)
        return balance
