-- Makes the ledger's time the server's again, and moves all that is kept in the ledger's time with it.
-- USES: store
-- KEYS     clock, leases, watch, claims, receivers, account...
-- ARGV     MessagePack {accounts, reservations, tasks, usages, keep, queues, delivery_claims, failing}: the accounts' ids, how
--          the keys of reservations, tasks and each tenant's days of usage begin, for how long reservations are kept, and how
--          the keys of receivers begin; all share the hash tag of KEYS
-- RETURNS  {offset}: by how much the ledger's time was ahead
local ask = cmsgpack.unpack(ARGV[1])
local now, wall = clock(KEYS[1])
local offset = now - wall
if offset == 0 then
  return {0}
end

local function earlier(at)
  return at and at > 0 and math.max(at - offset, 1) or at
end

-- Moves the scores of a sorted set; its members.
local function move(key)
  local members, rows = {}, redis.call('ZRANGE', key, 0, -1, 'WITHSCORES')
  for index = 1, #rows, 2 do
    members[#members + 1] = rows[index]
    redis.call('ZADD', key, tonumber(rows[index + 1]) - offset, rows[index])
  end
  return members
end

local function move_reservation(id, state)
  local reservation = unpacked(redis.call('GET', ask.reservations .. id))
  if reservation and reservation.state == state then
    reservation.sent, reservation.lease = earlier(reservation.sent), earlier(reservation.lease)
    reservation.settled = earlier(reservation.settled)
    redis.call('SET', ask.reservations .. id, cmsgpack.pack(reservation), 'KEEPTTL')
  end
end

for _, id in ipairs(move(KEYS[2])) do
  move_reservation(id, 'reserved')
end
for index = 3, 4 do
  for _, id in ipairs(move(KEYS[index])) do
    move_reservation(id, 'accepted')
    local task = unpacked(redis.call('GET', ask.tasks .. id))
    if task and (task.silent_at or task.useless_at) then
      task.silent_at, task.useless_at = earlier(task.silent_at), earlier(task.useless_at)
      redis.call('SET', ask.tasks .. id, cmsgpack.pack(task), 'KEEPTTL')
    end
  end
end
-- Unknown submissions are named in the usage of the days on which they were made, by the clock before it stepped back or since.
local function move_unknown(from, to)
  for _, usage in ipairs(ask.usages) do
    for day = from, to do
      for _, field in ipairs(redis.call('HKEYS', string.format('%s%d', usage, day))) do
        local id = field:match('^unknown (%S+)$')
        if id then
          move_reservation(id, 'unknown')
        end
      end
    end
  end
end

local today, latest, kept = math.floor(wall / DAY_MS), math.floor(now / DAY_MS), math.ceil(ask.keep / DAY_MS)
move_unknown(today - kept, today)
move_unknown(math.max(today + 1, latest - kept), latest)
for _, receiver in ipairs(move(KEYS[5])) do
  move(ask.queues .. receiver)
  move(ask.delivery_claims .. receiver)
  local failing = redis.call('GET', ask.failing .. receiver)
  if failing then
    redis.call('SET', ask.failing .. receiver, string.format('%d', earlier(tonumber(failing))), 'KEEPTTL')
  end
end
for index, id in ipairs(ask.accounts) do
  if redis.call('HEXISTS', KEYS[5 + index], 'state') == 1 then
    local account = load_account(KEYS[5 + index], id)
    local state = account.state
    for _, name in ipairs({'probe_at', 'closed', 'reopened', 'rose', 'astray_until', 'caught_up', 'looked'}) do
      state[name] = earlier(state[name])
    end
    for _, figure in ipairs({state.count or {}, state.money or {}}) do
      figure.sent, figure.received = earlier(figure.sent), earlier(figure.received)
    end
    if state.doubt then
      state.doubt.since = earlier(state.doubt.since)
    end
    if state.newest then
      state.newest.sent = earlier(state.newest.sent)
    end
    save(account)
  end
end
redis.call('SET', KEYS[1], string.format('%d', wall))
redis.call('DEL', KEYS[1] .. ':offset')
return {offset}
