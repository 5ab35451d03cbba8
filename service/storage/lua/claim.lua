-- Takes the tasks whose check is due; nobody else gets them until the lease runs out.
-- USES: store
-- KEYS     clock, watch, claims
-- ARGV     MessagePack {most, lease, task}; task is the prefix of the tasks' keys, which share the hash tag of KEYS
-- RETURNS  {now, {reservation, task, when it was due}...}
local ask = cmsgpack.unpack(ARGV[1])
local now = clock(KEYS[1])
for _, id in ipairs(redis.call('ZRANGE', KEYS[3], '-inf', now, 'BYSCORE')) do
  redis.call('ZREM', KEYS[3], id)
  redis.call('ZADD', KEYS[2], now, id)
end
local claimed = {now}
local due = redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, ask.most, 'WITHSCORES')
for index = 1, #due, 2 do
  local id = due[index]
  redis.call('ZREM', KEYS[2], id)
  local task = redis.call('GET', ask.task .. id)
  if task then
    redis.call('ZADD', KEYS[3], now + ask.lease, id)
    claimed[#claimed + 1] = {id, task, tonumber(due[index + 1])}
  end
end
return claimed
