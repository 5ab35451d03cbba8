-- Makes the ledger's time the server's again, and moves everything that is stored in the ledger's time back with it.
-- USES: store
-- KEYS     clock, leases, poll:due, poll:claimed, webhook:queues, account...
-- ARGV     MessagePack {accounts, reservation_prefix, task_prefix, usage_prefixes, keep_ms, due_prefix, claimed_prefix,
--          failing_prefix}: the accounts' ids, the prefixes of keys (usage_prefixes those of each tenant's days, the last
--          three those of delivery queues), which share the hash tag of KEYS, and how long reservations are kept
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
  local reservation = decode(redis.call('GET', args.reservation_prefix .. id))
  if reservation and reservation.state == state then
    for _, field in ipairs({'dispatched_at', 'lease_expires_at', 'settled_at'}) do
      reservation[field] = move_back(reservation[field])
    end
    redis.call('SET', args.reservation_prefix .. id, cmsgpack.pack(reservation), 'KEEPTTL')
  end
end

for _, id in ipairs(move_scores(KEYS[2])) do
  move_reservation(id, 'reserved')
end
for index = 3, 4 do
  for _, id in ipairs(move_scores(KEYS[index])) do
    move_reservation(id, 'accepted')
    local task = decode(redis.call('GET', args.task_prefix .. id))
    if task and (task.not_found_at or task.unresolved_at) then
      task.not_found_at, task.unresolved_at = move_back(task.not_found_at), move_back(task.unresolved_at)
      redis.call('SET', args.task_prefix .. id, cmsgpack.pack(task), 'KEEPTTL')
    end
  end
end

-- Moves the reservations of unknown outcome that the usage of some days lists.
local function move_unknown_reservations(first_day, last_day)
  for _, prefix in ipairs(args.usage_prefixes) do
    for day = first_day, last_day do
      for _, field in ipairs(redis.call('HKEYS', string.format('%s%d', prefix, day))) do
        local id = field:match('^unknown (%S+)$')
        if id then
          move_reservation(id, 'unknown')
        end
      end
    end
  end
end

-- Their days are those of the server's clock when they were made: before it stepped back, once or repeatedly, or since.
local today, latest_day, kept_days = math.floor(wall / DAY_MS), math.floor(now / DAY_MS), math.ceil(args.keep_ms / DAY_MS)
move_unknown_reservations(today - kept_days, today)
move_unknown_reservations(math.max(today + 1, latest_day - kept_days), latest_day + kept_days)
for _, queue in ipairs(move_scores(KEYS[5])) do
  move_scores(args.due_prefix .. queue)
  move_scores(args.claimed_prefix .. queue)
  local failing_until = redis.call('GET', args.failing_prefix .. queue)
  if failing_until then
    redis.call('SET', args.failing_prefix .. queue, string.format('%d', move_back(tonumber(failing_until))), 'KEEPTTL')
  end
end
for index, id in ipairs(args.accounts) do
  if redis.call('HEXISTS', KEYS[5 + index], 'state') == 1 then
    local account = load_account(KEYS[5 + index], id)
    local state = account.state
    for _, field in ipairs({
      'next_probe_at', 'closed_at', 'reopened_at', 'last_increase_at', 'untracked_until', 'reconciled_at',
      'last_balance_check_at',
    }) do
      state[field] = move_back(state[field])
    end
    for _, reading in ipairs({state.count or {}, state.money or {}}) do
      reading.sent_at, reading.received_at = move_back(reading.sent_at), move_back(reading.received_at)
    end
    if state.pending_inference then
      state.pending_inference.unknown_at = move_back(state.pending_inference.unknown_at)
    end
    if state.last_finished_task then
      state.last_finished_task.sent_at = move_back(state.last_finished_task.sent_at)
    end
    save_state(account)
  end
end
redis.call('SET', KEYS[1], string.format('%d', wall))
redis.call('DEL', KEYS[1] .. ':offset')
return {offset}
