-- Holds a place for a submission in the windows of its tenant and on the first account that can pay.
-- USES: store, windows, account, reserve_rules
-- KEYS     clock, tenant, reservation, leases, account...
-- ARGV     MessagePack {reservation, tenant, kind, lease, keep, accounts, reservations, idempotency}; reservations is the
--          prefix of their keys, idempotency {at, key, content, keep}: where that key is kept, with what, and how long
-- RETURNS  all times in the server's time:
--          {'granted', tenant's state, wall, account, lease}
--          {'denied', tenant's state, wall, {policy, limit, resets_at or 0}...}
--          {'no-account', tenant's state, wall, look_at or 0}
--          {'replayed', tenant's state, wall, reservation, its state}, {'in-flight', tenant's state, wall} or
--          {'key-reused', tenant's state, wall}: what was submitted before under the same idempotency key
--          {'settled', tenant's state, wall}: it was given up before it arrived
--          {'gone', tenant's state, wall}: there is no such tenant (any more)
local ask = cmsgpack.unpack(ARGV[1])
local now, wall = clock(KEYS[1])
local tenant = load_tenant(KEYS[2])
roll(tenant, wall)

if not tenant.kept then
  return {'gone', cmsgpack.pack(tenant.state), wall}
end
local known = load_reservation(KEYS[3])
if known then
  if known.state == 'not-sent' or known.state == 'refused' then
    return {'settled', cmsgpack.pack(tenant.state), wall}
  end
  return {'granted', cmsgpack.pack(tenant.state), wall, known.account, known.lease - now + wall}
end

local idempotency = ask.idempotency
local first = idempotency and redis.call('GET', idempotency.at)
if first then
  local id, content = first:match('^(%S+) (%S+)$')
  local earlier = load_reservation(ask.reservations .. id)
  if earlier and content ~= idempotency.content then
    return {'key-reused', cmsgpack.pack(tenant.state), wall}
  elseif earlier and earlier.state == 'reserved' then
    return {'in-flight', cmsgpack.pack(tenant.state), wall}
  elseif earlier then
    return {'replayed', cmsgpack.pack(tenant.state), wall, id, earlier.state}
  end
end

local accounts = {}
for index, id in ipairs(ask.accounts) do
  accounts[index] = load_account(KEYS[4 + index], id)
end

local refused, holds = {}, {}
for _, limit in ipairs(tenant.policy.limits) do
  local counter = tenant.state.windows[limit.window]
  if limit.tasks and counter.tasks + counter.tasks_reserved >= limit.tasks then
    refused[#refused + 1] = {limit.window .. '-tasks', limit.tasks, resets_at(limit.window, wall) or 0}
  end
end
local max_active = tenant.policy.max_active
if max_active and tenant.state.active >= max_active then
  refused[#refused + 1] = {'max-active', max_active, 0}
end
local account, retry = choose(accounts, tenant.policy.purse, ask.kind, now)
if account then
  holds = money_holds(tenant, price_to_hold(account, ask.kind), wall, refused)
end
if #refused > 0 then
  return {'denied', cmsgpack.pack(tenant.state), wall, unpack(refused)}
elseif not account then
  return {'no-account', cmsgpack.pack(tenant.state), wall, retry and retry - now + wall or 0}
end

local reservation = {
  state = 'reserved', tenant = ask.tenant, kind = ask.kind, created = wall, lease = now + ask.lease, settled = 0,
  key = idempotency and idempotency.key, periods = {},
}
for _, window in ipairs(WINDOWS) do
  local counter = tenant.state.windows[window]
  reservation.periods[window] = counter.name or counter.period
end
aim(account, reservation, holds, tenant.policy.purse, now)
count(tenant, reservation, 1)
save(tenant)
save(account)
save_reservation(KEYS[3], reservation, ask.keep)
redis.call('ZADD', KEYS[4], reservation.lease, ask.reservation)
if idempotency then
  redis.call('SET', idempotency.at, ask.reservation .. ' ' .. idempotency.content, 'PX', idempotency.keep)
end
return {'granted', cmsgpack.pack(tenant.state), wall, account.id, reservation.lease - now + wall}
