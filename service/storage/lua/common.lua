-- What the scripts share; put in front of each of them. The rules are those of service/domain/quota.py and
-- balance.py, name for name: there they are specified, here they are carried out where nothing can come between.
-- Times are milliseconds, money is in fen. States are kept as MessagePack; nothing that may be empty is a table in them.

local WINDOWS = {'minute', 'hour', 'day', 'month', 'total'}
local PROBE_INTERVAL = 60000
local ONE_AT_A_TIME = 2000
local DAY = 86400000

-- The ledger's clock: the larger of TIME and the last time seen, since a failover can step TIME back.
local function clock(key)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local seen = tonumber(redis.call('GET', key) or 0)
  if seen >= now then
    return seen
  end
  redis.call('SET', key, string.format('%d', now))
  return now
end

local function unpacked(text)
  return text and cmsgpack.unpack(text) or nil
end

local function load_tenant(key)
  local found = redis.call('HMGET', key, 'policy', 'state')
  local policy, state = unpacked(found[1]), unpacked(found[2]) or {active = 0}
  state.windows = state.windows or {}
  return {key = key, policy = policy or {limits = {}}, state = state, kept = policy ~= nil}
end

local function load_account(key, id)
  local found = redis.call('HMGET', key, 'policy', 'state')
  local policy = unpacked(found[1])
  local state = unpacked(found[2])
    or {status = 'open', probe_at = 0, open = 0, sending = 0, seq = 0, unknown = 0}
  local defaults = {floor_count = 0, floor_money = 0, max_price = {}}
  return {key = key, id = id, policy = policy or defaults, state = state, kept = policy ~= nil}
end

-- The state of a tenant or account that was deleted stays only for as long as its last tasks may need it.
local function save(owner)
  redis.call('HSET', owner.key, 'state', cmsgpack.pack(owner.state))
  if not owner.kept then
    redis.call('PEXPIRE', owner.key, 60 * DAY)
  end
end

-- Days since the epoch of the first of the month around a day, by the civil calendar.
local function month_start(days)
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5)
  return days - day
end

local function period_of(window, at)
  if window == 'minute' then
    return at - at % 60000
  elseif window == 'hour' then
    return at - at % 3600000
  elseif window == 'day' then
    return at - at % DAY
  elseif window == 'month' then
    return month_start(math.floor(at / DAY)) * DAY
  end
  return 0
end

local function resets_at(window, at)
  if window == 'total' then
    return nil
  elseif window == 'minute' then
    return period_of(window, at) + 60000
  elseif window == 'hour' then
    return period_of(window, at) + 3600000
  elseif window == 'day' then
    return period_of(window, at) + DAY
  end
  return period_of(window, period_of(window, at) + 32 * DAY)
end

local function roll(tenant, now)
  for _, window in ipairs(WINDOWS) do
    local period, counter = period_of(window, now), tenant.state.windows[window]
    if not counter or counter.period ~= period then
      tenant.state.windows[window] =
        {period = period, tasks = 0, tasks_reserved = 0, money = 0, money_reserved = 0, overrun = 0}
    end
  end
end

-- Balances ------------------------------------------------------------------------------------------------------------

local function can_pay(account, kind, submissions)
  local state, policy = account.state, account.policy
  if not state.count then
    return true
  end
  local beyond = submissions - math.max(state.count.value - policy.floor_count, 0)
  if beyond < 0 or not state.money then
    return true
  end
  local price = kind and state.highest and state.highest[kind] or 0
  return state.money.value - beyond * price > policy.floor_money
end

local function may_probe(account, purse)
  local state, policy = account.state, account.policy
  if purse == 'count_only' then
    return false
  end
  local below_count = state.count and state.count.value > 0 and policy.floor_count > 0
  local below_money = state.money and state.money.value > 0 and policy.floor_money > 0
  return not (below_count or below_money)
end

local function standing(account, purse, kind, now)
  local state = account.state
  if state.status == 'invalid' then
    return 'invalid', 0
  elseif state.status == 'exhausted' then
    if may_probe(account, purse) and now >= state.probe_at then
      return 'probe', now
    end
    return 'exhausted', math.max(state.probe_at, now + ONE_AT_A_TIME)
  end
  local pays
  if purse ~= 'count_only' then
    pays = can_pay(account, kind, state.sending)
  elseif state.count then
    pays = state.count.value - state.open > account.policy.floor_count
  else
    pays = state.open == 0
  end
  if pays then
    return 'pays', now
  end
  return 'exhausted', now + ONE_AT_A_TIME
end

-- The price one more submission may have; nil where none is known.
local function price_to_hold(account, kind)
  local state = account.state
  if state.count and state.count.value > state.open then
    return 0
  end
  return account.policy.max_price[kind] or (state.highest and state.highest[kind])
end

local function observed(known, value, sent, received)
  if not value then
    return false, known
  elseif not known or sent > known.received then
    return known ~= nil and value > known.value, {value = value, sent = sent, received = received}
  elseif value < known.value then
    return false, {value = value, sent = math.max(sent, known.sent), received = math.max(received, known.received)}
  end
  return false, known
end

local function observe(account, figures, sent, received)
  local state, rose_count, rose_money = account.state, false, false
  rose_count, state.count = observed(state.count, figures.count, sent, received)
  rose_money, state.money = observed(state.money, figures.money, sent, received)
  if state.status == 'exhausted' and (rose_count or rose_money) then
    state.status = 'open'
  end
  if state.status == 'open' and not can_pay(account, nil, 0) then
    state.status, state.probe_at = 'exhausted', received + PROBE_INTERVAL
  end
end

local function refuse(account, status, sent, received)
  local state = account.state
  local newest = math.max(state.count and state.count.sent or 0, state.money and state.money.sent or 0)
  if sent >= newest then
    state.status, state.probe_at = status, received + PROBE_INTERVAL
  end
end

local function receipt(account, kind, before, after, alone, succeeded)
  local state = account.state
  if alone and before and after.count and after.money then
    local count, money = before.count - after.count, before.money - after.money
    if (count == 1 and money == 0) or (count == 0 and money >= 0) then
      local charged = count > 0 or money > 0
      if charged then
        state.prices, state.highest = state.prices or {}, state.highest or {}
        state.prices[kind] = {count = count, money = money}
        state.highest[kind] = math.max(state.highest[kind] or 0, money)
      end
      if charged or not succeeded then
        return {count = count, money = money, basis = 'observed'}
      end
    end
  end
  if after.count and after.count > 0 then
    return {count = 1, money = 0, basis = 'estimated'}
  end
  local price = state.prices and state.prices[kind]
  if price then
    return {count = price.count, money = price.money, basis = 'estimated'}
  end
  return {count = 0, money = 0, basis = 'unknown'}
end

-- Reservations --------------------------------------------------------------------------------------------------------

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
  if state.status == 'exhausted' then
    state.probe_at = now + PROBE_INTERVAL
  end
  state.seq = state.seq + 1
  reservation.account, reservation.sent, reservation.seq = account.id, now, state.seq
  reservation.alone = state.open == 0
  reservation.before = nil
  if state.count and state.money then
    reservation.before = {count = state.count.value, money = state.money.value}
  end
  reservation.holds = holds
  state.open = state.open + 1
  state.sending = state.sending + 1
  book_money(tenant, reservation, 'money_reserved', 1)
end
