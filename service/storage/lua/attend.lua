-- Reads tasks that somebody looks at or waits for, and has those that run checked as often as may be for a while.
-- KEYS     clock, watch
-- ARGV     MessagePack {reservations, task, interest, interested, check_after}: how the keys of tasks and of interest
--          begin, which share the hash tag of KEYS, and for how long the interest lasts
-- RETURNS  {now, each task or false}
local ask = cmsgpack.unpack(ARGV[1])
local now = clock(KEYS[1])
local found = {now}
for index, id in ipairs(ask.reservations) do
  local packed = redis.call('GET', ask.task .. id)
  if packed and redis.call('ZSCORE', KEYS[2], id) then
    redis.call('SET', ask.interest .. id, '', 'PX', ask.interested)
    redis.call('ZADD', KEYS[2], 'XX', 'LT', now + ask.check_after, id)
  end
  found[index + 1] = packed
end
return found
