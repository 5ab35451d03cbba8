-- Claims the deliveries that are due, queue by queue; no other process gets them until the lease expires.
-- USES: store, deliveries
-- KEYS     clock, webhook:queues
-- ARGV     MessagePack {limit, lease_ms, deliveries}, deliveries as in shared/deliveries.lua
-- RETURNS  {now, {id, the delivery}...}
local args = cmsgpack.unpack(ARGV[1])
local now = advance_clock(KEYS[1])
local deliveries, answer = args.deliveries, {now}
for _, queue in ipairs(redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, args.limit)) do
  local waiting, claimed = deliveries.due_prefix .. queue, deliveries.claimed_prefix .. queue
  for _, id in ipairs(redis.call('ZRANGE', claimed, '-inf', now, 'BYSCORE')) do
    redis.call('ZREM', claimed, id)
    redis.call('ZADD', waiting, now, id)
  end
  local free = math.min(max_concurrent(deliveries, queue, now) - redis.call('ZCARD', claimed), args.limit - #answer + 1)
  for _, id in ipairs(redis.call('ZRANGE', waiting, '-inf', now, 'BYSCORE', 'LIMIT', 0, math.max(free, 0))) do
    redis.call('ZREM', waiting, id)
    local delivery = redis.call('GET', deliveries.delivery_prefix .. id)
    if delivery then
      redis.call('ZADD', claimed, now + args.lease_ms, id)
      answer[#answer + 1] = {id, delivery}
    end
  end
  schedule_queue(deliveries, queue, now)
end
return answer
