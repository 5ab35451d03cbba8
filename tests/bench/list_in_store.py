"""Print the CPU milliseconds of a process for a list of 20 tasks in the store, and for a filter that none matches.

    list_in_store.py REDIS_URL TENANT_ID

It runs with the modules of the checkout that is measured, over the keys of `{plain}`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from service.domain.tasks import State
from tests.storage.seeded_store import SeededStore

_FIRST_CALLS, _CALLS = 20, 200


async def main(url: str, tenant: int) -> None:
    store = SeededStore(url)
    times = []
    for state in (None, State.FAILED):
        for call in range(_CALLS + _FIRST_CALLS):
            if call == _FIRST_CALLS:  # those before warm it up
                times.append(-time.process_time())
            await store.tasks.list_page(tenant, state=state, kind=None, limit=20, cursor=None)
        times[-1] += time.process_time()
    await store.connections.aclose()
    sys.stdout.write(json.dumps([used / _CALLS * 1000 for used in times]))


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
