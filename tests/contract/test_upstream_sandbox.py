"""The upstream client against the sandbox, an independent reading of the vendor's document."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2
import msgspec
import pytest

from service.domain.ledger import Balance
from service.domain.tasks import (
    ArtifactName,
    FaceEnhanceOptions,
    Kind,
    Options,
    SeamlessOptions,
    UpscaleOptions,
    VectorizeOptions,
)
from service.domain.tenants import Account
from service.sandbox.app import RunningSandbox, SandboxConfig, open_sandbox
from service.sandbox.faults import Behaviour, Fault
from service.sandbox.store import AccountBalance
from service.usecases.ports import CheckOutcome, Image, SubmitOutcome
from tests.contract.client import CIPHER, USER_KEY, Caller, open_caller
from tests.sandbox.images import draw_face, draw_logo, draw_scene, encode_image

EMPTY = Account(2, "empty", CIPHER.encrypt(b"empty"))
UNKNOWN_ACCOUNT = Account(3, "unknown", CIPHER.encrypt(b"unknown"))
IMAGE, VECTOR, GRID = ArtifactName.IMAGE, ArtifactName.VECTOR, ArtifactName.GRID


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    """Yield an upstream whose tasks take no time."""
    accounts = {USER_KEY: AccountBalance(2, 10), "empty": AccountBalance(0, 0)}
    async with open_sandbox(SandboxConfig(accounts=accounts, seconds=0)) as sandbox:
        yield sandbox


@pytest.fixture
async def caller(sandbox: RunningSandbox) -> AsyncIterator[Caller]:
    async with open_caller(sandbox.url) as caller:
        yield caller


def png_image(content: bytes) -> Image:
    return Image(content, b"", "image/png", 320, 240)


LOGO = png_image(encode_image(draw_logo()))


@pytest.mark.parametrize(
    ("options", "content", "artifacts"),
    [
        (UpscaleOptions(scale=1.5, prompt="a cat"), encode_image(draw_scene()), {IMAGE}),
        (UpscaleOptions(scale=1, vector=True), encode_image(draw_logo()), {IMAGE, VECTOR}),
        (VectorizeOptions(colors=3), encode_image(draw_logo()), {VECTOR}),
        (FaceEnhanceOptions(), encode_image(draw_face()), {IMAGE}),
        (SeamlessOptions(fit=0.3), encode_image(draw_scene()), {IMAGE, GRID}),
    ],
)
async def test_kinds(
    sandbox: RunningSandbox, caller: Caller, options: Options, content: bytes, artifacts: set[ArtifactName]
) -> None:
    """Each kind is accepted, charged and finished, and its artifacts can be fetched."""
    submitted = await caller.submit(options=options, image=png_image(content))
    assert submitted.outcome is SubmitOutcome.ACCEPTED
    assert submitted.balance == Balance(1, 1000)
    await sandbox.control.wait_until_idle()
    check = await caller.check(submitted.upstream_id)
    assert check.outcome is CheckOutcome.SUCCEEDED
    assert check.balance == Balance(1, 1000)
    assert artifacts <= {artifact.name for artifact in check.artifacts}
    async with httpx2.AsyncClient(trust_env=False) as http:
        for artifact in check.artifacts:
            assert (await http.get(artifact.url)).status_code == 200
    (received, _) = (request for request in await sandbox.control.list_requests() if request.operation != "file")
    assert received.image_bytes == len(content)
    assert options.kind is not Kind.UPSCALE or len(received.fields) == 12


async def test_refusals(caller: Caller) -> None:
    """The three refusals of a submit are distinguished."""
    assert (await caller.submit(account=UNKNOWN_ACCOUNT)).outcome is SubmitOutcome.INVALID_ACCOUNT
    assert (await caller.submit(account=EMPTY, image=LOGO)).outcome is SubmitOutcome.EXHAUSTED
    broken = await caller.submit(image=png_image(b"no image at all"))
    assert broken.outcome is SubmitOutcome.REJECTED
    assert broken.reason


@pytest.mark.parametrize("spelling", ["Completed", "COMPLETED", "completed"])
async def test_spellings(sandbox: RunningSandbox, caller: Caller, spelling: str) -> None:
    """States are parsed in every letter case."""
    behaviour = msgspec.convert(
        {"spelling": spelling, "faults": [{"on": "submit", "fail": "x", "times": 1}]}, Behaviour
    )
    await sandbox.control.set_behaviour(behaviour)
    failed, finished = [(await caller.submit(image=LOGO)).upstream_id for _ in range(2)]
    await sandbox.control.wait_until_idle()
    await sandbox.control.set_behaviour(msgspec.structs.replace(behaviour, seconds=60, faults=()))
    still = (await caller.submit(image=LOGO)).upstream_id
    answered = [(await caller.check(item)).outcome for item in (failed, finished, still, "never-was")]
    assert answered == [CheckOutcome.FAILED, CheckOutcome.SUCCEEDED, CheckOutcome.RUNNING, CheckOutcome.NOT_FOUND]


@pytest.mark.parametrize("colon", [":", "："])
async def test_colons(sandbox: RunningSandbox, caller: Caller, colon: str) -> None:
    """The reason of a rejection is parsed behind an ASCII or a full-width colon."""
    await sandbox.control.set_behaviour(msgspec.convert({"colon": colon, "faults": [{"reject": "坏"}]}, Behaviour))
    rejected = await caller.submit(image=LOGO)
    assert (rejected.outcome, rejected.reason) == (SubmitOutcome.REJECTED, "坏")


@pytest.mark.parametrize(
    ("fault", "outcome", "charged"),
    [
        (Fault(reply="reset"), SubmitOutcome.UNKNOWN, True),
        (Fault(reply="reset", when="before"), SubmitOutcome.UNKNOWN, False),
        (Fault(reply="hang"), SubmitOutcome.UNKNOWN, True),
        (Fault(reply="page", status=502), SubmitOutcome.UNKNOWN, True),
        (Fault(reply="page", status=403, when="before"), SubmitOutcome.REJECTED, False),
        (Fault(reply="cut"), SubmitOutcome.UNKNOWN, True),
        (Fault(reply="garbled"), SubmitOutcome.UNKNOWN, True),
        (Fault(wrong={"task_id": "missing"}), SubmitOutcome.UNKNOWN, True),
        (Fault(wrong={"task_id": "null"}), SubmitOutcome.UNKNOWN, True),
        (Fault(wrong={"task_id": "int"}), SubmitOutcome.ACCEPTED, True),
        (Fault(wrong={"err_code": "string"}), SubmitOutcome.ACCEPTED, True),
        (Fault(wrong={"err_code": "missing"}), SubmitOutcome.ACCEPTED, True),
        (Fault(wrong={"remaining_count": "string", "remaining_money": "float"}), SubmitOutcome.ACCEPTED, True),
        (Fault(wrong={"remaining_count": "negative", "remaining_money": "null"}), SubmitOutcome.ACCEPTED, True),
        (Fault(refuse="系统繁忙"), SubmitOutcome.REJECTED, False),
    ],
)
async def test_faults(
    sandbox: RunningSandbox, caller: Caller, fault: Fault, outcome: SubmitOutcome, charged: bool
) -> None:
    """Whatever fails, a submit arrives once, and is free only if nothing was charged."""
    await sandbox.control.set_behaviour(Behaviour(faults=(fault,)))
    submitted = await caller.submit(image=LOGO, seconds=1)
    assert submitted.outcome is outcome
    assert len(await sandbox.control.list_requests()) == 1
    assert ((await sandbox.control.list_accounts())[USER_KEY] != AccountBalance(2, 10)) is charged


@pytest.mark.parametrize(
    ("way", "figures"),
    [
        ("string", Balance(1, 1000)),
        ("float", Balance(None, 1050)),
        ("int", Balance(1, 1000)),
        ("negative", Balance()),
        ("null", Balance()),
        ("missing", Balance()),
    ],
)
async def test_balances(sandbox: RunningSandbox, caller: Caller, way: str, figures: Balance) -> None:
    """Balances of a wrong type are parsed if possible, otherwise absent."""
    fault = msgspec.convert({"wrong": {"remaining_count": way, "remaining_money": way}}, Fault)
    await sandbox.control.set_behaviour(Behaviour(faults=(fault,)))
    submitted = await caller.submit(image=LOGO)
    assert (submitted.outcome, submitted.balance) == (SubmitOutcome.ACCEPTED, figures)


async def test_null_state(sandbox: RunningSandbox, caller: Caller) -> None:
    submitted = await caller.submit(image=LOGO)
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(on="check", wrong={"status": "null"}, times=1),)))
    assert (await caller.check(submitted.upstream_id)).outcome is CheckOutcome.NOT_FOUND
