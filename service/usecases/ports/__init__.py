"""What the use cases need of the world. Each docstring says what a second implementation must keep.

Everything that can't reach its store raises `LedgerUnavailable`; nothing here retries unless it says so.
"""

from service.usecases.ports.agenda import Agenda, Claimed, Delivery, Outcome
from service.usecases.ports.artifacts import Artifacts, Asked, BrokenOff, Fetched, Portion
from service.usecases.ports.callbacks import Callbacks, Reply
from service.usecases.ports.clock import Clock
from service.usecases.ports.ledger import Ask, Books, Ledger, Look, Settlement, Snapshot, TaskDraft
from service.usecases.ports.registry import RegistryChange, RegistryStore, RegistryView
from service.usecases.ports.tasks import Due, Page, Tasks
from service.usecases.ports.upstream import Answered, Check, Image, SubmitOutcome, Submitted, Upstream

__all__ = [
    "Agenda",
    "Answered",
    "Artifacts",
    "Ask",
    "Asked",
    "Books",
    "BrokenOff",
    "Callbacks",
    "Check",
    "Claimed",
    "Clock",
    "Delivery",
    "Due",
    "Fetched",
    "Image",
    "Ledger",
    "Look",
    "Outcome",
    "Page",
    "Portion",
    "RegistryChange",
    "RegistryStore",
    "RegistryView",
    "Reply",
    "Settlement",
    "Snapshot",
    "SubmitOutcome",
    "Submitted",
    "TaskDraft",
    "Tasks",
    "Upstream",
]
