-- Gives what a submission was charged for back to the windows of its tenant, once.
-- USES: store, windows
-- KEYS     clock, tenant, reservation
-- ARGV     MessagePack {reservation, tenant, reason, usage, keep_usage}; usage is the prefix of the keys of the
--          tenant's days, which share the hash tag of KEYS
-- RETURNS  {'refunded', the reservation, offset}, {'again' | 'free' | 'running', the reservation, offset} if it was
--          refunded before, cost nothing or has not ended, offset being how far the ledger's time is ahead, or {'gone'} if the tenant has no such reservation (any more)
local ask = cmsgpack.unpack(ARGV[1])
local now, wall = clock(KEYS[1])
local packed = redis.call('GET', KEYS[3])
local reservation = load_reservation(KEYS[3])
if not reservation or reservation.tenant ~= ask.tenant then
  return {'gone'}
end
local given
if reservation.refund then
  return {'again', packed, now - wall}
elseif reservation.state == 'refused' or reservation.state == 'not-sent' then
  return {'free', packed, now - wall}
elseif reservation.state == 'unknown' then
  given = {at = wall, reason = ask.reason, count = 0, money = reservation.holds.day or 0}
elseif not reservation.cost then
  return {'running', packed, now - wall}
else
  given = {at = wall, reason = ask.reason, count = reservation.cost.count, money = reservation.cost.money}
end
local tenant, before = load_tenant(KEYS[2]), tally(reservation)
roll(tenant, wall)
count(tenant, reservation, -1)
reservation.refund = given
count(tenant, reservation, 1)
book(ask.usage, ask.reservation, reservation, before, ask.keep_usage)
save(tenant)
save_reservation(KEYS[3], reservation, redis.call('PTTL', KEYS[3]))
return {'refunded', redis.call('GET', KEYS[3]), now - wall}
