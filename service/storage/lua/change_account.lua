-- Moves a reservation whose account did not take it to the next account. It keeps its place in the windows.
-- USES: store, windows, account, reserve_rules
-- KEYS     clock, tenant, reservation, previous account, account...
-- ARGV     MessagePack {previous_account, account_status, accounts}; account_status is what the previous account
--          becomes, if anything
-- RETURNS  as reserve; after anything but 'granted' the reservation is where it was, to be settled
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local tenant = load_tenant(KEYS[2])
roll_windows(tenant, wall)

local reservation = load_reservation(KEYS[3])
if not reservation or reservation.state ~= 'reserved' then
  return {'tombstoned', cmsgpack.pack(tenant.state), wall}
elseif reservation.account ~= args.previous_account then
  return {'granted', cmsgpack.pack(tenant.state), wall, reservation.account, reservation.lease_expires_at - now + wall}
end

local previous = load_account(KEYS[4], args.previous_account)
if args.account_status then
  close_on_refusal(previous.state, args.account_status, reservation.dispatched_at, now)
  save_state(previous)
end
local accounts = {}
for index, id in ipairs(args.accounts) do
  accounts[index] = load_account(KEYS[4 + index], id)
end
local account, retry_at = choose_account(accounts, tenant.policy.spending_mode, reservation.kind, now)
if not account then
  return {'no-account', cmsgpack.pack(tenant.state), wall, retry_at and retry_at - now + wall or 0}
end
apply_to_windows(tenant, reservation, -1)
local violations = {}
local holds = compute_money_holds(tenant, price_hold(account, reservation.kind), wall, violations)
if #violations > 0 then
  return {'denied', cmsgpack.pack(tenant.state), wall, unpack(violations)}
end
previous.state.open_submissions = previous.state.open_submissions - 1
previous.state.unsettled = previous.state.unsettled - 1
cancel_expected_charge(previous, reservation, true)
assign_account(account, reservation, holds, tenant.policy.spending_mode, now)
apply_to_windows(tenant, reservation, 1)
save_state(tenant)
save_state(previous)
save_state(account)
save_reservation(KEYS[3], reservation)
return {'granted', cmsgpack.pack(tenant.state), wall, account.id, reservation.lease_expires_at - now + wall}
