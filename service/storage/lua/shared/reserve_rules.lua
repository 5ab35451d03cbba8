-- Choosing the account of a submission, and what it holds of its tenant's limits.
-- USES: windows, account

-- Returns the money each window holds for a submission at a price, and appends each limit on money that can't hold it to
-- `violations`. Without a known price a limited window holds all that remains of it, the others the most of those: every
-- window is counted, so that a limit added later starts right.
local function compute_money_holds(tenant, price, wall, violations)
  local holds, max_hold = {}, 0
  for _, limit in ipairs(tenant.policy.limits) do
    if limit.money then
      local counter = tenant.state.windows[limit.window]
      local remaining = limit.money - counter.money - counter.money_reserved
      local hold = price or math.max(remaining, 1)
      if hold > math.max(remaining, 0) then
        violations[#violations + 1] = {limit.window .. '-money', limit.money, window_end(limit.window, wall) or 0}
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
local function choose_account(accounts, purse, kind, now)
  local retry_at
  for _, account in ipairs(accounts) do
    local availability, at = account_availability(account, purse, kind, now)
    if availability == 'pays' or availability == 'probe' then
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
local function assign_account(account, reservation, holds, purse, now)
  local state = account.state
  if account.is_probe then
    state.probe_at = now + PROBE_INTERVAL_MS
  end
  state.seq = state.seq + 1
  reservation.account, reservation.sent, reservation.seq = account.id, now, state.seq
  reservation.alone, reservation.clean = state.open == 0, unaccounted_charges(state) == 0
  reservation.use = state.count and state.count.value > unaccounted_charges(state)
  reservation.thrifty = purse == 'count_only'
  reservation.before = nil
  if state.count and state.money and not account.is_probe then
    reservation.before = {count = state.count.value, money = state.money.value}
  end
  reservation.holds = holds
  state.open = state.open + 1
  state.sending = state.sending + 1
  mark_charge_pending(state, reservation)
  add_expected_charge(account, reservation.kind, 1)
end
