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
  return {charges = 0, max_fen = 0, unpriced = 0, attributed_fen = 0}
end

local function decode(text)
  return text and cmsgpack.unpack(text) or nil
end

-- With a kind, its sums for the metrics are loaded too (shared/windows.lua).
local function load_tenant(key, kind)
  local stored
  if kind then
    stored = redis.call('HMGET', key, 'policy', 'state', 'spent ' .. kind)
  else
    stored = redis.call('HMGET', key, 'policy', 'state')
  end
  local policy, state = decode(stored[1]), decode(stored[2]) or {active_tasks = 0}
  state.windows = state.windows or {}
  return {key = key, policy = policy or {limits = {}}, state = state, is_registered = policy ~= nil, spent = stored[3]}
end

local function load_account(key, id)
  local stored = redis.call('HMGET', key, 'policy', 'state')
  local policy = decode(stored[1])
  local state = decode(stored[2])
    or {
      status = 'open', next_probe_at = 0, closed_at = 0, reopened_at = 0, last_increase_at = 0, open_submissions = 0,
      unsettled = 0, submission_seq = 0, pending_charges = 0, pending_prepaid_only = 0, untracked_charges = 0,
      untracked_until = 0, reconciled_at = 0, expected_drop = no_expected_drop(), unexplained_count = 0,
      unexplained_money_fen = 0, unknown_outcomes = 0, live_balance_checks = false, last_balance_check_at = 0,
      failed_balance_checks = 0,
    }
  local default_policy = {floor_count = 0, floor_money_fen = 0, max_price = {}}
  return {key = key, id = id, policy = policy or default_policy, state = state, is_registered = policy ~= nil}
end

-- Stores the state, and what else has changed of its owner: `changes` has names and values. Returns the state as it is
-- stored. That of a deleted tenant or account is kept only for as long as its last tasks may need it.
local function save_state(owner)
  local packed = cmsgpack.pack(owner.state)
  redis.call('HSET', owner.key, 'state', packed, unpack(owner.changes or {}))
  if not owner.is_registered then
    redis.call('PEXPIRE', owner.key, KEEP_DELETED_MS)
  end
  return packed
end

local function load_reservation(key)
  local reservation = decode(redis.call('GET', key))
  if reservation then
    reservation.window_starts, reservation.money_holds = reservation.window_starts or {}, reservation.money_holds or {}
  end
  return reservation
end

-- Stores a reservation for `keep_ms`, or until it would have expired anyway without that.
local function save_reservation(key, reservation, keep_ms)
  if not next(reservation.money_holds) then
    reservation.money_holds = nil
  end
  if not next(reservation.window_starts) then
    reservation.window_starts = nil
  end
  if reservation.balance_after and not next(reservation.balance_after) then
    reservation.balance_after = nil
  end
  if keep_ms then
    redis.call('SET', key, cmsgpack.pack(reservation), 'PX', keep_ms)
  else
    redis.call('SET', key, cmsgpack.pack(reservation), 'KEEPTTL')
  end
end
