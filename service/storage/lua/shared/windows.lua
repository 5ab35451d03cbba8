-- The calendar windows (UTC) of a tenant, its usage by day, and what a reservation counts for in both.

-- Returns the first day of the month of a day, both counted from the epoch, by the civil calendar.
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

local function window_start(window, at)
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

-- Returns when the window around a time ends; nil for `total`, which never does.
local function window_end(window, at)
  if window == 'total' then
    return nil
  elseif window == 'minute' then
    return window_start(window, at) + MINUTE_MS
  elseif window == 'hour' then
    return window_start(window, at) + HOUR_MS
  elseif window == 'day' then
    return window_start(window, at) + DAY_MS
  end
  return window_start(window, window_start(window, at) + 32 * DAY_MS)
end

-- Starts a new counter in each window whose period is over. The server's clock may step back into an earlier period, so the
-- counter of the last period is retained, and so are those of later periods after a step back. If the counter of an earlier
-- period is not retained, that period may have been counted before: its new counter gets a key of its own, so that
-- reservations of the lost one do not count in it.
local function roll_windows(tenant, wall)
  local state = tenant.state
  for _, window in ipairs(WINDOWS) do
    local start, counter = window_start(window, wall), state.windows[window]
    if not counter or counter.window_start ~= start then
      local counters = state.retained_counters and state.retained_counters[window] or {}
      local retained, current, previous = {}, nil, nil
      if counter then
        counters[#counters + 1] = counter
      end
      for _, candidate in ipairs(counters) do
        if candidate.window_start == start then
          current = candidate
        elseif candidate.window_start > start then
          retained[#retained + 1] = candidate
        elseif not previous or candidate.window_start > previous.window_start then
          previous = candidate
        end
      end
      if not current then
        current = {
          window_start = start, tasks = 0, tasks_reserved = 0, money_fen = 0, money_reserved_fen = 0, overrun_fen = 0,
        }
        if retained[1] then
          state.replacement_key_seq = (state.replacement_key_seq or 0) + 1
          current.replacement_key = -state.replacement_key_seq
        end
      end
      retained[#retained + 1] = previous
      state.windows[window] = current
      if retained[1] or state.retained_counters then
        state.retained_counters = state.retained_counters or {}
        state.retained_counters[window] = retained[1] and retained or nil
        state.retained_counters = next(state.retained_counters) and state.retained_counters or nil
      end
    end
  end
end

-- Returns the counter of a window by the key that reservations store; nil if it is no longer kept.
local function find_counter(tenant, window, key)
  local current = tenant.state.windows[window]
  if (current.replacement_key or current.window_start) == key then
    return current
  end
  for _, counter in ipairs(tenant.state.retained_counters and tenant.state.retained_counters[window] or {}) do
    if (counter.replacement_key or counter.window_start) == key then
      return counter
    end
  end
end

-- Adds what a reservation counts for to its windows, or subtracts it with a sign of -1. What it counts for follows from the
-- reservation alone, so every change of a reservation subtracts first and adds again afterwards.
local function apply_to_windows(tenant, reservation, sign)
  local state, cost, holds = reservation.state, reservation.cost, reservation.money_holds
  local is_open = state == 'reserved' or (state == 'accepted' and not cost)
  local is_charged = (state == 'accepted' or state == 'unknown') and not reservation.refund
  if is_open then
    local kinds = tenant.state.active_by_kind or {}
    kinds[reservation.kind] = (kinds[reservation.kind] or 0) + sign
    tenant.state.active_by_kind, tenant.state.active_tasks = kinds, tenant.state.active_tasks + sign
  end
  for _, window in ipairs(WINDOWS) do
    local counter = find_counter(tenant, window, reservation.window_starts[window])
    if counter then
      local hold = holds[window] or 0
      if state == 'reserved' then
        counter.tasks_reserved = counter.tasks_reserved + sign
      end
      if is_open then
        counter.money_reserved_fen = counter.money_reserved_fen + sign * hold
      end
      if is_charged then
        counter.tasks = counter.tasks + sign
        if cost then
          counter.money_fen = counter.money_fen + sign * cost.money_fen
        elseif state == 'unknown' then
          counter.money_fen = counter.money_fen + sign * hold
        end
      end
    end
  end
end

-- Returns what a reservation counts for in the usage of its day, by measure.
local function usage_of(reservation)
  local state, cost, refund, usage = reservation.state, reservation.cost, reservation.refund, {}
  if state == 'unknown' then
    usage['unknown'], usage['unknown-money'] = 1, reservation.money_holds.day or 0
  elseif state == 'accepted' and not cost then
    usage['running'] = 1
  elseif state == 'accepted' then
    usage[reservation.succeeded and 'succeeded' or 'failed'] = 1
    if cost.basis == 'unknown' then
      usage['unknown-cost'] = 1
    else
      usage[cost.basis .. '-count'], usage[cost.basis .. '-money'] = cost.count, cost.money_fen
    end
  elseif state ~= 'reserved' then
    usage[state] = 1
  end
  usage['overrun-money'] = reservation.overrun_fen
  if refund then
    usage['refunded'], usage['refunded-count'], usage['refunded-money'] = 1, refund.count, refund.money_fen
  end
  return usage
end

-- Returns the uses and the money that the usage charges for a kind on a range of days. `prefix` is that of their keys.
local function sum_days(prefix, kind, first, last)
  local uses, fen = 0, 0
  for day = first, last do
    local row = redis.call(
      'HMGET', string.format('%s%d', prefix, day), kind .. ' observed-count', kind .. ' estimated-count',
      kind .. ' refunded-count', kind .. ' observed-money', kind .. ' estimated-money', kind .. ' unknown-money',
      kind .. ' refunded-money'
    )
    uses = uses + tonumber(row[1] or 0) + tonumber(row[2] or 0) - tonumber(row[3] or 0)
    fen = fen + tonumber(row[4] or 0) + tonumber(row[5] or 0) + tonumber(row[6] or 0) - tonumber(row[7] or 0)
  end
  return uses, fen
end

-- Adds to a tenant's sums for the metrics how what its usage charges for a kind has changed on a day: start, uses and money
-- of each of SPENT_WINDOWS. Those of a new period, and of a kind that has none yet, are read from the usage. They are
-- stored with the tenant's state.
local function apply_to_spent(tenant, prefix, kind, day, changes, wall)
  local uses = (changes['observed-count'] or 0) + (changes['estimated-count'] or 0) - (changes['refunded-count'] or 0)
  local fen = (changes['observed-money'] or 0) + (changes['estimated-money'] or 0) + (changes['unknown-money'] or 0)
    - (changes['refunded-money'] or 0)
  if uses == 0 and fen == 0 then
    return
  end
  local field, today = 'spent ' .. kind, math.floor(wall / DAY_MS)
  local packed = tenant.spent
  if packed == nil then
    packed = redis.call('HGET', tenant.key, field)
  end
  local sums = decode(packed) or {}
  for index, window in ipairs(SPENT_WINDOWS) do
    local at, start = 3 * index, tenant.state.windows[window].window_start
    if sums[at - 2] ~= start then
      local first, last = today - KEEP_USAGE_MS / DAY_MS, math.max(today, day)
      if window ~= 'total' then
        first, last = start / DAY_MS, window_end(window, wall) / DAY_MS - 1
      end
      sums[at - 2], sums[at - 1], sums[at] = start, sum_days(prefix, kind, first, last)
    elseif day == today or window_start(window, day * DAY_MS) == start then
      sums[at - 1], sums[at] = sums[at - 1] + uses, sums[at] + fen
    end
  end
  tenant.spent = cmsgpack.pack(sums)
  tenant.changes = {field, tenant.spent}
end

-- Writes to the usage of a reservation's day how its measures differ from those of `before`, and lists it there while its
-- outcome is unknown or it is refunded. `prefix` is that of the keys of the tenant's days.
local function apply_to_usage(tenant, prefix, id, reservation, before, wall)
  local day = math.floor(reservation.created_at / DAY_MS)
  local key = string.format('%s%d', prefix, day)
  local changes = usage_of(reservation)
  for measure, value in pairs(before) do
    changes[measure] = (changes[measure] or 0) - value
  end
  local is_new = false
  for measure, change in pairs(changes) do
    if change ~= 0 and redis.call('HINCRBY', key, reservation.kind .. ' ' .. measure, change) == change then
      is_new = true
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
      kind = reservation.kind, refunded_at = refund.refunded_at, reason = refund.reason, count = refund.count,
      money_fen = refund.money_fen,
    }))
  elseif before['refunded'] then
    redis.call('HDEL', key, 'refund ' .. id)
  end
  if is_new then
    redis.call('PEXPIRE', key, KEEP_USAGE_MS)
  end
  apply_to_spent(tenant, prefix, reservation.kind, day, changes, wall)
end
