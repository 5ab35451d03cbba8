-- The clock, and what is stored.
--
-- All rules about quota and money are in this folder; the tests hold them against a model in Python. Times are milliseconds:
-- `now` is the ledger's time, `wall` the server's. Money is in fen. States are MessagePack maps in which no table is ever
-- empty, since Lua does not distinguish an empty list from an empty map.

-- Returns the ledger's time and the server's. The ledger's never goes back: when the server's clock steps back, it goes on
-- from where it was, ahead by an offset that shrinks by a tenth of what passes (service/domain/clock.py). The last time is
-- stored at `key`; the offset beside it, in CLOCK_OFFSET_UNITS of a millisecond, and only while there is one.
local function advance_clock(key)
  local time = redis.call('TIME')
  local wall = time[1] * 1000 + math.floor(time[2] / 1000)
  local stored = redis.call('MGET', key, key .. ':offset')
  local last, old_offset = tonumber(stored[1] or 0), tonumber(stored[2] or 0)
  local elapsed, offset = wall - last + math.ceil(old_offset / CLOCK_OFFSET_UNITS), 0
  if elapsed < 0 then
    offset = (last - wall) * CLOCK_OFFSET_UNITS
  elseif old_offset > 0 then
    offset = math.max(old_offset - elapsed, 0)
  end
  local now = wall + math.ceil(offset / CLOCK_OFFSET_UNITS)
  if now ~= last then
    redis.call('SET', key, string.format('%d', now))
  end
  if offset > 0 then
    redis.call('SET', key .. ':offset', string.format('%d', offset))
  elseif old_offset > 0 then
    redis.call('DEL', key .. ':offset')
  end
  return now, wall
end

local function no_expected_drop()
  return {tasks = 0, money = 0, unpriced = 0, taken = 0}
end

local function decode(text)
  return text and cmsgpack.unpack(text) or nil
end

local function load_tenant(key)
  local stored = redis.call('HMGET', key, 'policy', 'state')
  local policy, state = decode(stored[1]), decode(stored[2]) or {active = 0}
  state.windows = state.windows or {}
  return {key = key, policy = policy or {limits = {}}, state = state, is_registered = policy ~= nil}
end

local function load_account(key, id)
  local stored = redis.call('HMGET', key, 'policy', 'state')
  local policy = decode(stored[1])
  local state = decode(stored[2])
    or {
      status = 'open', probe_at = 0, closed = 0, reopened = 0, rose = 0, open = 0, sending = 0, seq = 0, uncharged = 0,
      thrifty = 0, astray = 0, astray_until = 0, caught_up = 0, expected = no_expected_drop(),
      unexplained_count = 0, unexplained_money = 0, unknown = 0, looks = false, looked = 0, in_vain = 0,
    }
  local default_policy = {floor_count = 0, floor_money = 0, max_price = {}}
  return {key = key, id = id, policy = policy or default_policy, state = state, is_registered = policy ~= nil}
end

-- The state of a deleted tenant or account is kept only for as long as its last tasks may need it.
local function save_state(owner)
  redis.call('HSET', owner.key, 'state', cmsgpack.pack(owner.state))
  if not owner.is_registered then
    redis.call('PEXPIRE', owner.key, KEEP_DELETED_MS)
  end
end

local function load_reservation(key)
  local reservation = decode(redis.call('GET', key))
  if reservation then
    reservation.periods, reservation.holds = reservation.periods or {}, reservation.holds or {}
  end
  return reservation
end

local function save_reservation(key, reservation, keep_ms)
  if not next(reservation.holds) then
    reservation.holds = nil
  end
  if not next(reservation.periods) then
    reservation.periods = nil
  end
  if reservation.after and not next(reservation.after) then
    reservation.after = nil
  end
  redis.call('SET', key, cmsgpack.pack(reservation), 'PX', keep_ms)
end
