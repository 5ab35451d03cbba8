from collections.abc import AsyncIterator

import pytest

from tests.demo.fake_gateway import FakeGateway, serve


@pytest.fixture
async def gateway() -> AsyncIterator[FakeGateway]:
    async with serve(FakeGateway()) as gateway:
        yield gateway
