-- Makes the ledger's time the server's again, and moves everything that is stored in the ledger's time back with it.
-- USES: store
-- KEYS     clock, leases, watch, claims, receivers, account...
-- ARGV     MessagePack {accounts, reservations, tasks, usages, keep, queues, delivery_claims, failing}: the accounts' ids,
--          the prefixes of the keys of reservations, of tasks and of each tenant's days of usage, how long reservations are
--          kept (ms), and the prefixes of the keys of delivery queues; all share the hash tag of KEYS
-- RETURNS  {offset}: by how much the ledger's time was ahead (ms)
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local offset = now - wall
if offset == 0 then
  return {0}
end

local function move_back(at)
  return at and at > 0 and math.max(at - offset, 1) or at
end

-- Moves the scores of a sorted set back. Returns its members.
local function move_scores(key)
  local members, rows = {}, redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for index = 1, #rows, 2 do
    members[#members + 1] = rows[index]
    redis.call('ZADD', key, tonumber(rows[index + 1]) - offset, rows[index])
  end
  return members
end

local function move_reservation(id, state)
  local reservation = decode(redis.call('GET', args.reservations .. id))
  if reservation and reservation.state == state then
    reservation.sent, reservation.lease = move_back(reservation.sent), move_back(reservation.lease)
    reservation.settled = move_back(reservation.settled)
    redis.call('SET', args.reservations .. id, cmsgpack.pack(reservation), 'KEEPTTL')
  end
end

for _, id in ipairs(move_scores(KEYS[2])) do
  move_reservation(id, 'reserved')
end
for index = 3, 4 do
  for _, id in ipairs(move_scores(KEYS[index])) do
    move_reservation(id, 'accepted')
    local task = decode(redis.call('GET', args.tasks .. id))
    if task and (task.silent_at or task.useless_at) then
      task.silent_at, task.useless_at = move_back(task.silent_at), move_back(task.useless_at)
      redis.call('SET', args.tasks .. id, cmsgpack.pack(task), 'KEEPTTL')
    end
  end
end

-- Moves the reservations of unknown outcome that the usage of some days lists.
local function move_unknown_reservations(first_day, last_day)
  for _, usage in ipairs(args.usages) do
    for day = first_day, last_day do
      for _, field in ipairs(redis.call('HKEYS', string.format('%s%d', usage, day))) do
        local id = field:match('^unknown (%S+)$')
        if id then
          move_reservation(id, 'unknown')
        end
      end
    end
  end
end

-- Their days are those of the server's clock when they were made: before it stepped back, or since.
local today, latest_day, kept_days = math.floor(wall / DAY_MS), math.floor(now / DAY_MS), math.ceil(args.keep / DAY_MS)
move_unknown_reservations(today - kept_days, today)
move_unknown_reservations(math.max(today + 1, latest_day - kept_days), latest_day)
for _, queue in ipairs(move_scores(KEYS[5])) do
  move_scores(args.queues .. queue)
  move_scores(args.delivery_claims .. queue)
  local failing_until = redis.call('GET', args.failing .. queue)
  if failing_until then
    redis.call('SET', args.failing .. queue, string.format('%d', move_back(tonumber(failing_until))), 'KEEPTTL')
  end
end
for index, id in ipairs(args.accounts) do
  if redis.call('HEXISTS', KEYS[5 + index], 'state') == 1 then
    local account = load_account(KEYS[5 + index], id)
    local state = account.state
    for _, field in ipairs({'probe_at', 'closed', 'reopened', 'rose', 'astray_until', 'caught_up', 'looked'}) do
      state[field] = move_back(state[field])
    end
    for _, reading in ipairs({state.count or {}, state.money or {}}) do
      reading.sent, reading.received = move_back(reading.sent), move_back(reading.received)
    end
    if state.doubt then
      state.doubt.since = move_back(state.doubt.since)
    end
    if state.newest then
      state.newest.sent = move_back(state.newest.sent)
    end
    save_state(account)
  end
end
redis.call('SET', KEYS[1], string.format('%d', wall))
redis.call('DEL', KEYS[1] .. ':offset')
return {offset}
