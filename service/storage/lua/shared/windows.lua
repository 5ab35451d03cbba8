-- What a reservation counts for, and what becomes of it, as service/domain/booking.py and usage.py have it.

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
  local key = string.format('%s%d', usage, math.floor(reservation.created / DAY))
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
