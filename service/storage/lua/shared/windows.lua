-- What a reservation counts for, and what becomes of it, as service/domain/booking.py and usage.py have it.
-- USES: store

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
    return at - at % MINUTE_MS
  elseif window == 'hour' then
    return at - at % HOUR_MS
  elseif window == 'day' then
    return at - at % DAY_MS
  elseif window == 'month' then
    return month_start(math.floor(at / DAY_MS)) * DAY_MS
  end
  return 0
end

local function resets_at(window, at)
  if window == 'total' then
    return nil
  elseif window == 'minute' then
    return period_of(window, at) + MINUTE_MS
  elseif window == 'hour' then
    return period_of(window, at) + HOUR_MS
  elseif window == 'day' then
    return period_of(window, at) + DAY_MS
  end
  return period_of(window, period_of(window, at) + 32 * DAY_MS)
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

-- Puts in what a reservation counts for in the windows it was counted in, if they are kept; with a sign of -1 takes it out.
local function count(tenant, reservation, sign)
  local state, cost, holds = reservation.state, reservation.cost, reservation.holds
  local open = state == 'reserved' or (state == 'accepted' and not cost)
  local charged = (state == 'accepted' or state == 'unknown') and not reservation.refund
  if open then
    local kinds = tenant.state.kinds or {}
    kinds[reservation.kind] = (kinds[reservation.kind] or 0) + sign
    tenant.state.kinds, tenant.state.active = kinds, tenant.state.active + sign
  end
  for _, window in ipairs(WINDOWS) do
    local counter = counter_of(tenant, window, reservation.periods[window])
    if counter then
      local held = holds[window] or 0
      if state == 'reserved' then
        counter.tasks_reserved = counter.tasks_reserved + sign
      end
      if open then
        counter.money_reserved = counter.money_reserved + sign * held
      end
      if charged then
        counter.tasks = counter.tasks + sign
        if cost then
          counter.money = counter.money + sign * cost.money
        elseif state == 'unknown' then
          counter.money = counter.money + sign * held
        end
      end
    end
  end
end

-- What a reservation counts for in the usage of its day.
local function tally(reservation)
  local state, cost, refund, found = reservation.state, reservation.cost, reservation.refund, {}
  if state == 'unknown' then
    found['unknown'], found['unknown-money'] = 1, reservation.holds.day or 0
  elseif state == 'accepted' and not cost then
    found['running'] = 1
  elseif state == 'accepted' then
    found[reservation.succeeded and 'succeeded' or 'failed'] = 1
    if cost.basis == 'unknown' then
      found['unknown-cost'] = 1
    else
      found[cost.basis .. '-count'], found[cost.basis .. '-money'] = cost.count, cost.money
    end
  elseif state ~= 'reserved' then
    found[state] = 1
  end
  if refund then
    found['refunded'], found['refunded-count'], found['refunded-money'] = 1, refund.count, refund.money
  end
  return found
end

-- Writes into the usage of a reservation's day how its tally has changed since `before`; `usage` is the prefix of the
-- days' keys, which share the hash tag of KEYS. Those that are unknown or were refunded are named there.
local function book(usage, id, reservation, before, keep)
  local key = string.format('%s%d', usage, math.floor(reservation.created / DAY_MS))
  local after = tally(reservation)
  for measure, value in pairs(before) do
    after[measure] = (after[measure] or 0) - value
  end
  for measure, change in pairs(after) do
    if change ~= 0 then
      redis.call('HINCRBY', key, reservation.kind .. ' ' .. measure, change)
    end
  end
  if reservation.state == 'unknown' then
    redis.call('HSET', key, 'unknown ' .. id, reservation.kind)
  elseif before['unknown'] then
    redis.call('HDEL', key, 'unknown ' .. id)
  end
  local refund = reservation.refund
  if refund then
    redis.call('HSET', key, 'refund ' .. id, cmsgpack.pack({
      kind = reservation.kind, at = refund.at, reason = refund.reason, count = refund.count, money = refund.money,
    }))
  elseif before['refunded'] then
    redis.call('HDEL', key, 'refund ' .. id)
  end
  redis.call('PEXPIRE', key, keep)
end
