-- Reads tasks that a caller reads or waits for, and has the running ones checked as often as possible for a while. A task
-- whose checks fail keeps its back-off: reading it must not load an upstream that is in trouble. An awaited one is also
-- checked before others.
-- USES: store
-- KEYS     clock, poll:due, poll:claimed, poll:awaited
-- ARGV     MessagePack {reservations, task_prefix, watched_prefix, watched_ms, check_interval_ms, is_awaited}: the prefixes of
--          the keys of tasks and of the marks of watched tasks, which share the hash tag of KEYS; how long a mark is kept
-- RETURNS  {wall, each task or false}
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local answer = {wall}
for index, id in ipairs(args.reservations) do
  local due_at = redis.call('ZSCORE', KEYS[2], id)
  if due_at or redis.call('ZSCORE', KEYS[3], id) then
    redis.call('SET', args.watched_prefix .. id, '', 'PX', args.watched_ms)
  end
  local task = redis.call('GET', args.task_prefix .. id)
  if task and due_at and tonumber(due_at) > now + args.check_interval_ms and not cmsgpack.unpack(task).failed_checks then
    due_at = now
    redis.call('ZADD', KEYS[2], due_at, id)
  end
  if due_at and args.is_awaited then
    redis.call('ZADD', KEYS[4], due_at, id)
  end
  answer[index + 1] = task
end
if args.is_awaited then
  redis.call('PEXPIRE', KEYS[4], args.watched_ms)
end
return answer
