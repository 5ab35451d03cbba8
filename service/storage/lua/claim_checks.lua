-- Claims the tasks whose check is due; no other process gets them until the lease expires.
-- USES: store
-- KEYS     clock, poll:due, poll:claimed
-- ARGV     MessagePack {limit, lease_ms, task_prefix}; task_prefix is that of the tasks' keys, which share the hash tag of
--          KEYS
-- RETURNS  {now, {reservation, task, when its check was due}...}
local args = cmsgpack.unpack(ARGV[1])
local now = advance_clock(KEYS[1])
for _, id in ipairs(redis.call('ZRANGE', KEYS[3], '-inf', now, 'BYSCORE')) do
  redis.call('ZREM', KEYS[3], id)
  redis.call('ZADD', KEYS[2], now, id)
end
local claimed = {now}
local due = redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, args.limit, 'WITHSCORES')
for index = 1, #due, 2 do
  local id = due[index]
  redis.call('ZREM', KEYS[2], id)
  local task = redis.call('GET', args.task_prefix .. id)
  if task then
    redis.call('ZADD', KEYS[3], now + args.lease_ms, id)
    claimed[#claimed + 1] = {id, task, tonumber(due[index + 1])}
  end
end
return claimed
