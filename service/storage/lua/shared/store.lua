-- The clock, the states and the calendar: shared by the scripts, which are put behind all that is in this folder.
--
-- The rules are those of the modules of the same names in service/domain, name for name: there they are specified, here
-- they are carried out where nothing can come between. Times are milliseconds, `now` in the ledger's time and `wall` in the
-- server's; money is in fen. States are kept as MessagePack; nothing that may be empty is a table in them, since Lua does
-- not tell an empty list from an empty map.

local WINDOWS = {'minute', 'hour', 'day', 'month', 'total'}
local PROBE_INTERVAL = 60000
local MOST_IN_VAIN = 5
local ONE_AT_A_TIME = 2000
local UNKNOWN_SETTLES = 600000
local DAY = 86400000

-- The ledger's time and the server's, as service/domain/clock.py has it. What was last seen of the first is kept at `key`,
-- by how much it was ahead beside it, in tenths of a millisecond, and only while it was.
local function clock(key)
  local time = redis.call('TIME')
  local wall = time[1] * 1000 + math.floor(time[2] / 1000)
  local kept = redis.call('MGET', key, key .. ':offset')
  local last, offset = tonumber(kept[1] or 0), tonumber(kept[2] or 0)
  local elapsed, left = wall - last + math.ceil(offset / 10), 0
  if elapsed < 0 then
    left = (last - wall) * 10
  elseif offset > 0 then
    left = math.max(offset - elapsed, 0)
  end
  local now = wall + math.ceil(left / 10)
  if now ~= last then
    redis.call('SET', key, string.format('%d', now))
  end
  if left > 0 then
    redis.call('SET', key .. ':offset', string.format('%d', left))
  elseif offset > 0 then
    redis.call('DEL', key .. ':offset')
  end
  return now, wall
end

-- No drop is expected.
local function nothing()
  return {tasks = 0, money = 0, unpriced = 0, taken = 0}
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
    or {
      status = 'open', probe_at = 0, closed = 0, reopened = 0, rose = 0, open = 0, sending = 0, seq = 0, uncharged = 0,
      thrifty = 0, astray = 0, astray_until = 0, caught_up = 0, expected = nothing(),
      unexplained_count = 0, unexplained_money = 0, unknown = 0, looks = false, looked = 0, in_vain = 0,
    }
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

-- Begins the windows anew whose period is over. The server's time may step back into an earlier period, so the counter of
-- the last one is set aside, as are those of later ones where it has. An earlier one whose counter is not kept, and which
-- may have been counted before, is counted under another name.
local function roll(tenant, wall)
  local state = tenant.state
  for _, window in ipairs(WINDOWS) do
    local period, counter = period_of(window, wall), state.windows[window]
    if not counter or counter.period ~= period then
      local known, aside, begun, last = state.aside and state.aside[window] or {}, {}, nil, nil
      if counter then
        known[#known + 1] = counter
      end
      for _, each in ipairs(known) do
        if each.period == period then
          begun = each
        elseif each.period > period then
          aside[#aside + 1] = each
        elseif not last or each.period > last.period then
          last = each
        end
      end
      if not begun then
        begun = {period = period, tasks = 0, tasks_reserved = 0, money = 0, money_reserved = 0, overrun = 0}
        if aside[1] then
          state.names = (state.names or 0) + 1
          begun.name = -state.names
        end
      end
      aside[#aside + 1] = last
      state.windows[window] = begun
      if aside[1] or state.aside then
        state.aside = state.aside or {}
        state.aside[window] = aside[1] and aside or nil
        state.aside = next(state.aside) and state.aside or nil
      end
    end
  end
end

-- The counter of a window in which a reservation was counted, if there still is one.
local function counter_of(tenant, window, name)
  local counter = tenant.state.windows[window]
  if (counter.name or counter.period) == name then
    return counter
  end
  for _, each in ipairs(tenant.state.aside and tenant.state.aside[window] or {}) do
    if (each.name or each.period) == name then
      return each
    end
  end
end
