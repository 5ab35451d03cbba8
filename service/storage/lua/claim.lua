-- Takes the tasks whose check is due; nobody else gets them until the lease runs out.
-- KEYS     clock, watch
-- ARGV     MessagePack {most, lease, task}; task is the prefix of the tasks' keys, which share the hash tag of KEYS
-- RETURNS  {now, {reservation, task}...}
local ask = cmsgpack.unpack(ARGV[1])
local now = clock(KEYS[1])
local claimed = {now}
for _, id in ipairs(redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, ask.most)) do
  local task = redis.call('GET', ask.task .. id)
  if not task then
    redis.call('ZREM', KEYS[2], id)
  else
    redis.call('ZADD', KEYS[2], now + ask.lease, id)
    claimed[#claimed + 1] = {id, task}
  end
end
return claimed
