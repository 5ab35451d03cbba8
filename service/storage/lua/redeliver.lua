-- Has a delivery sent again from the start, now; one that is under way goes on as it is.
-- USES: store, deliveries
-- KEYS     clock, receivers
-- ARGV     MessagePack {id, agenda}
-- RETURNS  {'again', now, the delivery}, or {'unknown', now}
local ask = cmsgpack.unpack(ARGV[1])
local now, wall = clock(KEYS[1])
local agenda, id = ask.agenda, ask.id
local delivery = unpacked(redis.call('GET', agenda.delivery .. id))
if not delivery then
  return {'unknown', now}
end
if not redis.call('ZSCORE', agenda.claims .. receiver_of(delivery), id) then
  delivery.attempts = 0
  redis.call('ZREM', agenda.failed, id)
  enqueue(agenda, id, delivery, 0, now, wall)
end
return {'again', now, cmsgpack.pack(delivery)}
