-- Records the result of an attempt to deliver. A success is recorded whichever process holds the claim by now.
-- USES: store, deliveries
-- KEYS     clock, webhook:queues
-- ARGV     MessagePack {id, lease_expires_at, state, attempts, retry_delay_ms, status, error, response_excerpt,
--          keep_delivered_ms, deliveries}: lease_expires_at is that of the claim, attempts how many were made (0 or 1)
-- RETURNS  {'recorded', now}, {'final', now} if the delivery has its result, or {'lease-lost', now} if its lease expired
--          and it was queued or claimed again
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local deliveries, id = args.deliveries, args.id
local delivery = decode(redis.call('GET', deliveries.delivery_prefix .. id))
if not delivery or delivery.state ~= 'pending' then
  return {'final', now}
end
local queue = queue_of(delivery)
local claimed = deliveries.claimed_prefix .. queue
local lease_expires_at = tonumber(redis.call('ZSCORE', claimed, id) or 0)
if args.state ~= 'delivered' and lease_expires_at ~= args.lease_expires_at then
  return {'lease-lost', now}
end
redis.call('ZREM', claimed, id)
redis.call('ZREM', deliveries.due_prefix .. queue, id)
delivery.state, delivery.updated_at, delivery.next_attempt_at = args.state, wall, nil
delivery.attempts = delivery.attempts + args.attempts
delivery.status, delivery.error, delivery.response_excerpt = args.status, args.error, args.response_excerpt
if args.state == 'delivered' then
  redis.call('DEL', deliveries.failing_prefix .. queue)
elseif args.attempts > 0 then
  local failing_until = string.format('%d', now + deliveries.failing_ms)
  redis.call('SET', deliveries.failing_prefix .. queue, failing_until, 'PX', deliveries.failing_ms)
end
if args.state == 'pending' then
  enqueue_delivery(deliveries, id, delivery, args.retry_delay_ms, now, wall)
  return {'recorded', now}
end
save_delivery(deliveries, id, delivery)
if args.state == 'delivered' then
  redis.call('PEXPIRE', deliveries.delivery_prefix .. id, args.keep_delivered_ms)
else
  redis.call('ZADD', deliveries.failed, wall, id)
  redis.call('ZREMRANGEBYSCORE', deliveries.failed, '-inf', wall - deliveries.keep_ms)
  redis.call('PEXPIRE', deliveries.failed, deliveries.keep_ms)
end
schedule_queue(deliveries, queue, now)
return {'recorded', now}
