-- Holding and moving places, as service/domain/quota.py has it.
-- USES: windows, account

local function money_holds(tenant, price, wall, refused)
  local holds, most = {}, 0
  for _, limit in ipairs(tenant.policy.limits) do
    if limit.money then
      local counter = tenant.state.windows[limit.window]
      local remaining = limit.money - counter.money - counter.money_reserved
      local wanted = price or math.max(remaining, 1)
      if wanted > math.max(remaining, 0) then
        refused[#refused + 1] = {limit.window .. '-money', limit.money, resets_at(limit.window, wall) or 0}
      end
      holds[limit.window], most = wanted, math.max(most, wanted)
    end
  end
  local elsewhere = price or most
  if elsewhere == 0 then
    return {}
  end
  for _, window in ipairs(WINDOWS) do
    holds[window] = holds[window] or elsewhere
  end
  return holds
end

-- The first account that can take a submission, else when to look again (nil if none is valid).
local function choose(accounts, purse, kind, now)
  local retry
  for _, account in ipairs(accounts) do
    local found, at = standing(account, purse, kind, now)
    if found == 'pays' or found == 'probe' then
      account.probes = found == 'probe'
      return account, nil
    elseif found == 'exhausted' then
      retry = math.min(retry or at, at)
    end
  end
  return nil, retry
end

local function aim(account, reservation, holds, purse, now)
  local state = account.state
  if account.probes then
    state.probe_at = now + PROBE_INTERVAL_MS
  end
  state.seq = state.seq + 1
  reservation.account, reservation.sent, reservation.seq = account.id, now, state.seq
  reservation.alone, reservation.clean = state.open == 0, missing(state) == 0
  reservation.use = state.count and state.count.value > missing(state)
  reservation.thrifty = purse == 'count_only'
  reservation.before = nil
  if state.count and state.money and not account.probes then
    reservation.before = {count = state.count.value, money = state.money.value}
  end
  reservation.holds = holds
  state.open = state.open + 1
  state.sending = state.sending + 1
  owe(state, reservation)
  expect(account, reservation.kind, 1)
end
