-- Claims the deliveries that are due, queue by queue; no other process gets them until the lease expires.
-- USES: store, deliveries
-- KEYS     clock, receivers
-- ARGV     MessagePack {most, lease, agenda}
-- RETURNS  {now, {id, the delivery}...}
local args = cmsgpack.unpack(ARGV[1])
local now = advance_clock(KEYS[1])
local agenda, answer = args.agenda, {now}
for _, queue in ipairs(redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, args.most)) do
  local waiting, claimed = agenda.queue .. queue, agenda.claims .. queue
  for _, id in ipairs(redis.call('ZRANGE', claimed, '-inf', now, 'BYSCORE')) do
    redis.call('ZREM', claimed, id)
    redis.call('ZADD', waiting, now, id)
  end
  local free = math.min(max_concurrent(agenda, queue, now) - redis.call('ZCARD', claimed), args.most - #answer + 1)
  for _, id in ipairs(redis.call('ZRANGE', waiting, '-inf', now, 'BYSCORE', 'LIMIT', 0, math.max(free, 0))) do
    redis.call('ZREM', waiting, id)
    local delivery = redis.call('GET', agenda.delivery .. id)
    if delivery then
      redis.call('ZADD', claimed, now + args.lease, id)
      answer[#answer + 1] = {id, delivery}
    end
  end
  schedule_queue(agenda, queue, now)
end
return answer
