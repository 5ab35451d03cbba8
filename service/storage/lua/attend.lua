-- Reads tasks that somebody looks at or waits for, and has those that run checked as often as may be for a while. One
-- whose checks fail is asked about ever later all the same: who looks on must not make that worse.
-- USES: store
-- KEYS     clock, watch, claims
-- ARGV     MessagePack {reservations, task, interest, interested, check_after}: how the keys of tasks and of interest
--          begin, which share the hash tag of KEYS, for how long the interest lasts, and the time between two checks
-- RETURNS  {wall, each task or false}
local ask = cmsgpack.unpack(ARGV[1])
local now, wall = clock(KEYS[1])
local found = {wall}
for index, id in ipairs(ask.reservations) do
  local waits = redis.call('ZSCORE', KEYS[2], id)
  if waits or redis.call('ZSCORE', KEYS[3], id) then
    redis.call('SET', ask.interest .. id, '', 'PX', ask.interested)
  end
  local task = redis.call('GET', ask.task .. id)
  if task and waits and tonumber(waits) > now + ask.check_after and not cmsgpack.unpack(task).misses then
    redis.call('ZADD', KEYS[2], now, id)
  end
  found[index + 1] = task
end
return found
