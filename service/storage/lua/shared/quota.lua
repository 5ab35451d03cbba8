-- Holding and moving places, as service/domain/quota.py has it.

local function load_reservation(key)
  local found = unpacked(redis.call('GET', key))
  if found then
    found.periods, found.holds = found.periods or {}, found.holds or {}
  end
  return found
end

local function save_reservation(key, reservation, keep)
  if not next(reservation.holds) then
    reservation.holds = nil
  end
  if not next(reservation.periods) then
    reservation.periods = nil
  end
  if reservation.after and not next(reservation.after) then
    reservation.after = nil
  end
  redis.call('SET', key, cmsgpack.pack(reservation), 'PX', keep)
end

-- Adds to the counters of the windows that are still those of the reservation.
local function book(tenant, reservation, changes)
  for _, window in ipairs(WINDOWS) do
    local counter = tenant.state.windows[window]
    if reservation.periods[window] == counter.period then
      for name, change in pairs(changes) do
        counter[name] = counter[name] + change
      end
    end
  end
end

local function book_money(tenant, reservation, name, sign)
  for window, amount in pairs(reservation.holds) do
    local counter = tenant.state.windows[window]
    if reservation.periods[window] == counter.period then
      counter[name] = counter[name] + sign * amount
    end
  end
end

local function money_holds(tenant, price, now, refused)
  local holds = {}
  for _, limit in ipairs(tenant.policy.limits) do
    if limit.money then
      local counter = tenant.state.windows[limit.window]
      local remaining = limit.money - counter.money - counter.money_reserved
      local wanted = price or math.max(remaining, 1)
      if wanted > math.max(remaining, 0) then
        refused[#refused + 1] = {limit.window .. '-money', limit.money, resets_at(limit.window, now) or 0}
      end
      holds[limit.window] = wanted
    end
  end
  return holds
end

-- The first account that can take a submission, else when to look again (nil if none is valid).
local function choose(accounts, purse, kind, now)
  local retry
  for _, account in ipairs(accounts) do
    local found, at = standing(account, purse, kind, now)
    if found == 'pays' or found == 'probe' then
      return account, nil
    elseif found == 'exhausted' then
      retry = math.min(retry or at, at)
    end
  end
  return nil, retry
end

local function aim(tenant, account, reservation, holds, now)
  local state = account.state
  local probes = state.status == 'exhausted'
  if probes then
    state.probe_at = now + PROBE_INTERVAL
  end
  state.seq = state.seq + 1
  reservation.account, reservation.sent, reservation.seq = account.id, now, state.seq
  reservation.alone = state.open == 0
  reservation.before = nil
  if state.count and state.money and not probes then
    reservation.before = {count = state.count.value, money = state.money.value}
  end
  reservation.holds = holds
  state.open = state.open + 1
  state.sending = state.sending + 1
  book_money(tenant, reservation, 'money_reserved', 1)
end
