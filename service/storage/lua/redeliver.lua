-- Starts a delivery again, due now; one that is claimed goes on as it is.
-- USES: store, deliveries
-- KEYS     clock, receivers
-- ARGV     MessagePack {id, agenda}
-- RETURNS  {'again', now, the delivery}, or {'unknown', now}
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local agenda, id = args.agenda, args.id
local delivery = decode(redis.call('GET', agenda.delivery .. id))
if not delivery then
  return {'unknown', now}
end
if not redis.call('ZSCORE', agenda.claims .. queue_of(delivery), id) then
  delivery.attempts = 0
  redis.call('ZREM', agenda.failed, id)
  enqueue_delivery(agenda, id, delivery, 0, now, wall)
end
return {'again', now, cmsgpack.pack(delivery)}
