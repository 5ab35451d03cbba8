-- Moves a reservation that an account did not take to the next account, keeping its place in the windows.
-- USES: store, windows, account, reserve_rules
-- KEYS     clock, tenant, reservation, account that was left, account...
-- ARGV     MessagePack {left, closes, keep, accounts}; closes is the status the left account has earned, if any
-- RETURNS  as reserve; after anything but 'granted' the reservation is where it was, to be settled
local ask = cmsgpack.unpack(ARGV[1])
local now, wall = clock(KEYS[1])
local tenant = load_tenant(KEYS[2])
roll(tenant, wall)

local reservation = load_reservation(KEYS[3])
if not reservation or reservation.state ~= 'reserved' then
  return {'settled', cmsgpack.pack(tenant.state), wall}
elseif reservation.account ~= ask.left then
  return {'granted', cmsgpack.pack(tenant.state), wall, reservation.account, reservation.lease - now + wall}
end

local left = load_account(KEYS[4], ask.left)
if ask.closes then
  refuse(left.state, ask.closes, reservation.sent, now)
  save(left)
end
local accounts = {}
for index, id in ipairs(ask.accounts) do
  accounts[index] = load_account(KEYS[4 + index], id)
end
local account, retry = choose(accounts, tenant.policy.purse, reservation.kind, now)
if not account then
  return {'no-account', cmsgpack.pack(tenant.state), wall, retry and retry - now + wall or 0}
end
count(tenant, reservation, -1)
local refused = {}
local holds = money_holds(tenant, price_to_hold(account, reservation.kind), wall, refused)
if #refused > 0 then
  return {'denied', cmsgpack.pack(tenant.state), wall, unpack(refused)}
end
left.state.open = left.state.open - 1
left.state.sending = left.state.sending - 1
spare(left, reservation, true)
aim(account, reservation, holds, tenant.policy.purse, now)
count(tenant, reservation, 1)
save(tenant)
save(left)
save(account)
save_reservation(KEYS[3], reservation, ask.keep)
return {'granted', cmsgpack.pack(tenant.state), wall, account.id, reservation.lease - now + wall}
