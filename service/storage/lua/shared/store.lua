-- The clock, the states and the calendar: shared by the scripts, which are put behind all that is in this folder.
--
-- The rules are those of the modules of the same names in service/domain, name for name: there they are specified, here
-- they are carried out where nothing can come between. Times are milliseconds, `now` in the ledger's time and `wall` in the
-- server's; money is in fen. States are kept as MessagePack; nothing that may be empty is a table in them, since Lua does
-- not tell an empty list from an empty map.

-- The ledger's time and the server's, as service/domain/clock.py has it. What was last seen of the first is kept at `key`,
-- by how much it was ahead beside it, in CLOCK_OFFSET_UNITS of a millisecond, and only while it was.
local function clock(key)
  local time = redis.call('TIME')
  local wall = time[1] * 1000 + math.floor(time[2] / 1000)
  local kept = redis.call('MGET', key, key .. ':offset')
  local last, offset = tonumber(kept[1] or 0), tonumber(kept[2] or 0)
  local elapsed, left = wall - last + math.ceil(offset / CLOCK_OFFSET_UNITS), 0
  if elapsed < 0 then
    left = (last - wall) * CLOCK_OFFSET_UNITS
  elseif offset > 0 then
    left = math.max(offset - elapsed, 0)
  end
  local now = wall + math.ceil(left / CLOCK_OFFSET_UNITS)
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
    redis.call('PEXPIRE', owner.key, KEEP_DELETED_MS)
  end
end

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
