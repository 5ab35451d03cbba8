"""Money spent beyond a limit because the price was unknown: script and model agree."""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from service.domain.ledger import Balance
from service.domain.tenants import Limit, TenantPolicy, Window
from tests.storage.ledger_comparison import ACCOUNTS
from tests.storage.ledger_machine import LedgerMachine
from tests.storage.ledger_strategies import KINDS, usual_plan
from tests.support.valkey import Valkey


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(window=st.sampled_from(Window), remaining=st.integers(100, 250), price=st.integers(50, 400))
@example(window=Window.TOTAL, remaining=100, price=101)
@example(window=Window.MONTH, remaining=250, price=250)
def test_overrun(valkey: Valkey, window: Window, remaining: int, price: int) -> None:
    """A risen price is charged in full; the part beyond the limit counts as overrun."""
    machine = LedgerMachine(valkey.url)
    try:
        machine.set_upstream(late=True, now=True, count=0, money=2_000)
        machine.advance_clock(3_600_000)
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0]), 1)
        spent = machine.tenant_state().windows[window].money_fen
        machine.write_tenant_policy(TenantPolicy((Limit(window, money_fen=spent + remaining),)))
        machine.run_submission(ACCOUNTS[0], usual_plan(KINDS[0])._replace(price_fen=price), 1)
        machine.stored_data_matches()
        counted = machine.tenant_state().windows[window]
        assert machine.upstream.balances[ACCOUNTS[0]] == Balance(0, 2_000 - 200 - price)
        assert (counted.money_fen, counted.overrun_fen) == (spent + price, max(price - remaining, 0))
    finally:
        machine.teardown()
