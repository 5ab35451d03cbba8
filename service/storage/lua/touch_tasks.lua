-- Reads tasks that a caller reads or waits for, and has the running ones checked as often as possible for a while. A task
-- whose checks fail keeps its back-off: reading it must not load an upstream that is in trouble.
-- USES: store
-- KEYS     clock, watch, claims
-- ARGV     MessagePack {reservations, task, interest, interested, check_after}: the prefixes of the keys of tasks and of the
--          marks of watched tasks, which share the hash tag of KEYS; how long a mark is kept (ms); the time between two
--          checks (ms)
-- RETURNS  {wall, each task or false}
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local answer = {wall}
for index, id in ipairs(args.reservations) do
  local due_at = redis.call('ZSCORE', KEYS[2], id)
  if due_at or redis.call('ZSCORE', KEYS[3], id) then
    redis.call('SET', args.interest .. id, '', 'PX', args.interested)
  end
  local task = redis.call('GET', args.task .. id)
  if task and due_at and tonumber(due_at) > now + args.check_after and not cmsgpack.unpack(task).misses then
    redis.call('ZADD', KEYS[2], now, id)
  end
  answer[index + 1] = task
end
return answer
