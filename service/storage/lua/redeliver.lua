-- Starts a delivery again, due now; one that is claimed goes on as it is.
-- USES: store, deliveries
-- KEYS     clock, webhook:queues
-- ARGV     MessagePack {id, deliveries}, deliveries as in shared/deliveries.lua
-- RETURNS  {'redelivered', now, the delivery}, or {'not-found', now}
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local deliveries, id = args.deliveries, args.id
local delivery = decode(redis.call('GET', deliveries.delivery_prefix .. id))
if not delivery then
  return {'not-found', now}
end
if not redis.call('ZSCORE', deliveries.claimed_prefix .. queue_of(delivery), id) then
  delivery.attempts = 0
  redis.call('ZREM', deliveries.failed, id)
  enqueue_delivery(deliveries, id, delivery, 0, now, wall)
end
return {'redelivered', now, cmsgpack.pack(delivery)}
