-- Records that the upstream still works on some tasks, as record_check does for one, and schedules their next checks.
-- USES: store, checks
-- KEYS     clock, poll:due, poll:claimed
-- ARGV     MessagePack {reservations, task_prefix, watched_prefix, check_interval_ms, keep_running_ms, channel}: the prefixes
--          of the keys of tasks and of the marks of watched tasks, which share the hash tag of KEYS; channel is where changes
--          of tasks are published
-- RETURNS  {wall, {reservation, task} of each that has a later version...}
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local answer, due = {wall}, {}
for _, id in ipairs(args.reservations) do
  local key = args.task_prefix .. id
  local task = decode(redis.call('GET', key))
  if task and not task.finished_at then
    local old_version = task.version
    apply_running(task, wall)
    due[#due + 1] = next_check_at(task, args.watched_prefix .. id, args.check_interval_ms, now, wall)
    due[#due + 1] = id
    local packed = save_task(key, id, task, old_version, args.keep_running_ms, args.channel, wall)
    if task.version > old_version then
      answer[#answer + 1] = {id, packed}
    end
  else
    redis.call('ZREM', KEYS[2], id)
  end
end
if #due > 0 then
  redis.call('ZADD', KEYS[2], unpack(due))
end
-- Last: after an error above the claims expire, and the tasks are checked again.
redis.call('ZREM', KEYS[3], unpack(args.reservations))
return answer
