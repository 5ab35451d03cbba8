-- Claims the turn to look at an account's balance by checking its newest finished task again, if that is due.
-- USES: store, account
-- KEYS     clock, account
-- ARGV     MessagePack {account, count_only}: whether a tenant that may spend nothing but uses has the account
-- RETURNS  {'due', now, reservation} or {'not-due', now}
local ask = cmsgpack.unpack(ARGV[1])
local now = clock(KEYS[1])
local account = load_account(KEYS[2], ask.account)
local state = account.state
local early = not state.newest or now < state.looked + PROBE_INTERVAL_MS
if not account.kept or state.status == 'invalid' or early then
  return {'not-due', now}
end
local starved = ask.count_only and state.count and state.count.value - missing(state) <= account.policy.floor_count
local low = account.policy.floor_money > 0 and state.open == 0 and not can_pay(account, dearest(account), 0)
if state.status ~= 'exhausted' and not starved and not low and not (state.looks and is_stuck(state)) then
  return {'not-due', now}
end
state.looked, state.in_vain = now, state.in_vain + 1
save(account)
return {'due', now, state.newest.reservation}
