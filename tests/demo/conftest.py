from collections.abc import AsyncIterator

import pytest

from tests.demo.gateway import FakeGateway, serve


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    async with serve(FakeGateway()) as gateway:
        yield gateway
