-- Reserves a place for a submission in the windows of its tenant and on the first account that can pay. The same reservation
-- is made once, however often it is asked for.
-- USES: store, windows, account, reserve_rules
-- KEYS     clock, tenant, reservation, leases, account...
-- ARGV     MessagePack {reservation, tenant, kind, lease, keep, accounts, reservations, idempotency}; reservations is the
--          prefix of their keys, idempotency {at, key, content, keep}: where that key is stored, with what, and how long
-- RETURNS  all times in the server's time:
--          {'granted', tenant's state, wall, account, lease}
--          {'denied', tenant's state, wall, {policy, limit, resets_at or 0}...}
--          {'no-account', tenant's state, wall, retry_at or 0}
--          {'replayed', tenant's state, wall, reservation, its state}, {'in-flight', tenant's state, wall} or
--          {'key-reused', tenant's state, wall}: another submission has the same idempotency key
--          {'settled', tenant's state, wall}: it was settled as refused or not sent before it arrived
--          {'gone', tenant's state, wall}: there is no such tenant (any more)
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local tenant = load_tenant(KEYS[2])
roll_windows(tenant, wall)

if not tenant.is_registered then
  return {'gone', cmsgpack.pack(tenant.state), wall}
end
local existing = load_reservation(KEYS[3])
if existing then
  if existing.state == 'not-sent' or existing.state == 'refused' then
    return {'settled', cmsgpack.pack(tenant.state), wall}
  end
  return {'granted', cmsgpack.pack(tenant.state), wall, existing.account, existing.lease - now + wall}
end

local idempotency = args.idempotency
local stored = idempotency and redis.call('GET', idempotency.at)
if stored then
  local id, content = stored:match('^(%S+) (%S+)$')
  local original = load_reservation(args.reservations .. id)
  if original and content ~= idempotency.content then
    return {'key-reused', cmsgpack.pack(tenant.state), wall}
  elseif original and original.state == 'reserved' then
    return {'in-flight', cmsgpack.pack(tenant.state), wall}
  elseif original then
    return {'replayed', cmsgpack.pack(tenant.state), wall, id, original.state}
  end
end

local accounts = {}
for index, id in ipairs(args.accounts) do
  accounts[index] = load_account(KEYS[4 + index], id)
end

local violations, holds = {}, {}
for _, limit in ipairs(tenant.policy.limits) do
  local counter = tenant.state.windows[limit.window]
  if limit.tasks and counter.tasks + counter.tasks_reserved >= limit.tasks then
    violations[#violations + 1] = {limit.window .. '-tasks', limit.tasks, window_end(limit.window, wall) or 0}
  end
end
local max_active = tenant.policy.max_active
if max_active and tenant.state.active >= max_active then
  violations[#violations + 1] = {'max-active', max_active, 0}
end
local account, retry_at = choose_account(accounts, tenant.policy.purse, args.kind, now)
if account then
  holds = compute_money_holds(tenant, price_hold(account, args.kind), wall, violations)
end
if #violations > 0 then
  return {'denied', cmsgpack.pack(tenant.state), wall, unpack(violations)}
elseif not account then
  return {'no-account', cmsgpack.pack(tenant.state), wall, retry_at and retry_at - now + wall or 0}
end

local reservation = {
  state = 'reserved', tenant = args.tenant, kind = args.kind, created = wall, lease = now + args.lease, settled = 0,
  key = idempotency and idempotency.key, periods = {},
}
for _, window in ipairs(WINDOWS) do
  local counter = tenant.state.windows[window]
  reservation.periods[window] = counter.name or counter.period
end
assign_account(account, reservation, holds, tenant.policy.purse, now)
apply_to_windows(tenant, reservation, 1)
save_state(tenant)
save_state(account)
save_reservation(KEYS[3], reservation, args.keep)
redis.call('ZADD', KEYS[4], reservation.lease, args.reservation)
if idempotency then
  redis.call('SET', idempotency.at, args.reservation .. ' ' .. idempotency.content, 'PX', idempotency.keep)
end
return {'granted', cmsgpack.pack(tenant.state), wall, account.id, reservation.lease - now + wall}
