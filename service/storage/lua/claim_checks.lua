-- Claims the tasks whose check is due, first those that callers await; no other process gets them until the lease expires.
-- USES: store
-- KEYS     clock, poll:due, poll:claimed, poll:awaited
-- ARGV     MessagePack {limit, lease_ms, task_prefix}; task_prefix is that of the tasks' keys, which share the hash tag of
--          KEYS
-- RETURNS  {now, {reservation, task, when its check was due}...}
local args = cmsgpack.unpack(ARGV[1])
local now = advance_clock(KEYS[1])
for _, id in ipairs(redis.call('ZRANGE', KEYS[3], '-inf', now, 'BYSCORE')) do
  redis.call('ZREM', KEYS[3], id)
  redis.call('ZADD', KEYS[2], now, id)
end
local ids, due_times, keys = {}, {}, {}

local function add(id, due_at)
  ids[#ids + 1], due_times[#due_times + 1], keys[#keys + 1] = id, due_at, args.task_prefix .. id
end

local awaited = redis.call('ZRANGE', KEYS[4], '-inf', now, 'BYSCORE', 'LIMIT', 0, args.limit)
if #awaited > 0 then
  redis.call('ZREM', KEYS[4], unpack(awaited))
  for index, due_at in ipairs(redis.call('ZMSCORE', KEYS[2], unpack(awaited))) do
    if due_at and tonumber(due_at) <= now then
      add(awaited[index], tonumber(due_at))
    end
  end
end
if #ids > 0 then
  redis.call('ZREM', KEYS[2], unpack(ids))
end
local first_other = #ids + 1
local due = redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, args.limit - #ids, 'WITHSCORES')
for index = 1, #due, 2 do
  add(due[index], tonumber(due[index + 1]))
end
local claimed, leases = {now}, {}
if #ids >= first_other then
  redis.call('ZREM', KEYS[2], unpack(ids, first_other))
end
for index, task in ipairs(#ids > 0 and redis.call('MGET', unpack(keys)) or {}) do
  if task then
    leases[#leases + 1], leases[#leases + 2] = now + args.lease_ms, ids[index]
    claimed[#claimed + 1] = {ids[index], task, due_times[index]}
  end
end
if #leases > 0 then
  redis.call('ZADD', KEYS[3], unpack(leases))
end
return claimed
