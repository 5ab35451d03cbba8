-- Choosing the account of a submission, and what it holds of its tenant's limits.
-- USES: windows, account

-- Returns the money each window holds for a submission at a price, and appends each limit on money that can't hold it to
-- `violations`. Without a known price a limited window holds all that remains of it, the others the most of those: every
-- window is counted, so that a limit added later starts right.
local function compute_money_holds(tenant, price, wall, violations)
  local holds, max_hold = {}, 0
  for _, limit in ipairs(tenant.policy.limits) do
    if limit.money_fen then
      local counter = tenant.state.windows[limit.window]
      local remaining = limit.money_fen - counter.money_fen - counter.money_reserved_fen
      local hold = price or math.max(remaining, 1)
      if hold > math.max(remaining, 0) then
        violations[#violations + 1] = {limit.window .. '-money', limit.money_fen, window_end(limit.window, wall) or 0}
      end
      holds[limit.window], max_hold = hold, math.max(max_hold, hold)
    end
  end
  local default_hold = price or max_hold
  if default_hold == 0 then
    return {}
  end
  for _, window in ipairs(WINDOWS) do
    holds[window] = holds[window] or default_hold
  end
  return holds
end

-- Returns the first account that can take a submission; otherwise nil and when to try again (nil if no account is valid).
local function choose_account(accounts, spending_mode, kind, now)
  local retry_at
  for _, account in ipairs(accounts) do
    local availability, at = account_availability(account, spending_mode, kind, now)
    if availability == 'available' or availability == 'probe' then
      account.is_probe = availability == 'probe'
      return account, nil
    elseif availability == 'exhausted' then
      retry_at = math.min(retry_at or at, at)
    end
  end
  return nil, retry_at
end

-- Puts a reservation on an account and stores the balance before it. A probe stores none: if it is accepted, the account
-- was topped up in the meantime.
local function assign_account(account, reservation, holds, spending_mode, now)
  local state = account.state
  if account.is_probe then
    state.next_probe_at = now + PROBE_INTERVAL_MS
  end
  state.submission_seq = state.submission_seq + 1
  reservation.account, reservation.dispatched_at, reservation.submission_seq = account.id, now, state.submission_seq
  reservation.exclusive, reservation.balance_exact = state.open_submissions == 0, unaccounted_charges(state) == 0
  reservation.expects_prepaid = state.count and state.count.value > unaccounted_charges(state)
  reservation.prepaid_only = spending_mode == 'count_only'
  reservation.balance_before = nil
  if state.count and state.money and not account.is_probe then
    reservation.balance_before = {count = state.count.value, money_fen = state.money.value}
  end
  reservation.money_holds = holds
  state.open_submissions = state.open_submissions + 1
  state.unsettled = state.unsettled + 1
  mark_charge_pending(state, reservation)
  add_expected_charge(account, reservation.kind, 1)
end
