-- Refunds what a submission was charged for to the windows of its tenant, once. From then on it counts for nothing in them,
-- whatever a late outcome makes of it.
-- USES: store, windows
-- KEYS     clock, tenant, reservation
-- ARGV     MessagePack {reservation, tenant, reason, usage_prefix}; usage_prefix is that of the keys of the
--          tenant's days, which share the hash tag of KEYS
-- RETURNS  {status, the reservation, offset}, where status is 'refunded', or 'already-refunded', 'nothing-charged' or
--          'running' if nothing changed, and offset is by how much the ledger's time is ahead; or {'not-found'} if the
--          tenant has no such reservation (any more)
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local packed = redis.call('GET', KEYS[3])
local reservation = load_reservation(KEYS[3])
if not reservation or reservation.tenant ~= args.tenant then
  return {'not-found'}
end
local refund
if reservation.refund then
  return {'already-refunded', packed, now - wall}
elseif reservation.state == 'refused' or reservation.state == 'not-sent' then
  return {'nothing-charged', packed, now - wall}
elseif reservation.state == 'unknown' then
  refund = {refunded_at = wall, reason = args.reason, count = 0, money_fen = reservation.money_holds.day or 0}
elseif not reservation.cost then
  return {'running', packed, now - wall}
else
  local cost = reservation.cost
  refund = {refunded_at = wall, reason = args.reason, count = cost.count, money_fen = cost.money_fen}
end
local tenant, old_usage = load_tenant(KEYS[2], reservation.kind), usage_of(reservation)
roll_windows(tenant, wall)
apply_to_windows(tenant, reservation, -1)
reservation.refund = refund
apply_to_windows(tenant, reservation, 1)
apply_to_usage(tenant, args.usage_prefix, args.reservation, reservation, old_usage, wall)
save_state(tenant)
save_reservation(KEYS[3], reservation)
return {'refunded', redis.call('GET', KEYS[3]), now - wall}
