-- Reserves a place for a submission in the windows of its tenant and on the first account that can pay. The same reservation
-- is made once, however often it is asked for.
-- USES: store, windows, account, reserve_rules
-- KEYS     clock, tenant, reservation, leases, account...
-- ARGV     MessagePack {reservation, tenant, kind, lease_ms, keep_ms, accounts, reservation_prefix, idempotency},
--          idempotency {redis_key, key_digest, content_digest, digests, keep_ms}: the stored digests begin with content_digest
-- RETURNS  all times in the server's time:
--          {'granted', tenant's state, wall, account, lease_expires_at}
--          {'denied', tenant's state, wall, {policy, limit, resets_at or 0}...}
--          {'no-account', tenant's state, wall, retry_at or 0}
--          {'replayed', tenant's state, wall, reservation, its state}, {'in-flight', tenant's state, wall} or
--          {'key-reused', tenant's state, wall}: another submission has the same idempotency key
--          {'tombstoned', tenant's state, wall}: it was settled as refused or not sent before it arrived
--          {'unknown-tenant', tenant's state, wall}: there is no such tenant (any more)
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local tenant = load_tenant(KEYS[2])
roll_windows(tenant, wall)

if not tenant.is_registered then
  return {'unknown-tenant', cmsgpack.pack(tenant.state), wall}
end
local existing = load_reservation(KEYS[3])
if existing then
  if existing.state == 'not-sent' or existing.state == 'refused' then
    return {'tombstoned', cmsgpack.pack(tenant.state), wall}
  end
  return {'granted', cmsgpack.pack(tenant.state), wall, existing.account, existing.lease_expires_at - now + wall}
end

local idempotency = args.idempotency
local stored = idempotency and redis.call('GET', idempotency.redis_key)
if stored then
  local id, content = stored:match('^(%S+) (%S+)')
  local original = load_reservation(args.reservation_prefix .. id)
  if original and content ~= idempotency.content_digest then
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
if max_active and tenant.state.active_tasks >= max_active then
  violations[#violations + 1] = {'max-active', max_active, 0}
end
local account, retry_at = choose_account(accounts, tenant.policy.spending_mode, args.kind, now)
if account then
  holds = compute_money_holds(tenant, price_hold(account, args.kind), wall, violations)
end
if #violations > 0 then
  return {'denied', cmsgpack.pack(tenant.state), wall, unpack(violations)}
elseif not account then
  return {'no-account', cmsgpack.pack(tenant.state), wall, retry_at and retry_at - now + wall or 0}
end

local reservation = {
  state = 'reserved', tenant = args.tenant, kind = args.kind, created_at = wall, lease_expires_at = now + args.lease_ms,
  settled_at = 0, key_digest = idempotency and idempotency.key_digest, window_starts = {},
}
for _, window in ipairs(WINDOWS) do
  local counter = tenant.state.windows[window]
  reservation.window_starts[window] = counter.replacement_key or counter.window_start
end
assign_account(account, reservation, holds, tenant.policy.spending_mode, now)
apply_to_windows(tenant, reservation, 1)
local packed_state = save_state(tenant)
save_state(account)
save_reservation(KEYS[3], reservation, args.keep_ms)
redis.call('ZADD', KEYS[4], reservation.lease_expires_at, args.reservation)
if idempotency then
  redis.call('SET', idempotency.redis_key, args.reservation .. ' ' .. idempotency.digests, 'PX', idempotency.keep_ms)
end
return {'granted', packed_state, wall, account.id, reservation.lease_expires_at - now + wall}
