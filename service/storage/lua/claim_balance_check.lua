-- Claims the turn to read an account's balance by checking its last finished task again, if that is due: once per interval
-- for an account that is exhausted, too close to a floor for some task, or lacks charges that no response will show, and for
-- one whose uses are spent while a tenant may spend nothing else.
-- USES: store, account
-- KEYS     clock, account
-- ARGV     MessagePack {account, count_only}; count_only says whether such a tenant uses the account
-- RETURNS  {'due', now, reservation} or {'not-due', now}
local args = cmsgpack.unpack(ARGV[1])
local now = advance_clock(KEYS[1])
local account = load_account(KEYS[2], args.account)
local state = account.state
local is_early = not state.last_finished_task or now < state.last_balance_check_at + PROBE_INTERVAL_MS
if not account.is_registered or state.status == 'invalid' or is_early then
  return {'not-due', now}
end
local has_no_uses = args.count_only and state.count
  and state.count.value - unaccounted_charges(state) <= account.policy.floor_count
local is_near_floor = account.policy.floor_money_fen > 0 and state.open_submissions == 0
  and not stays_above_floors(account, max_price_any_kind(account), 0)
if state.status ~= 'exhausted' and not has_no_uses and not is_near_floor
  and not (state.live_balance_checks and needs_balance_check(state)) then
  return {'not-due', now}
end
state.last_balance_check_at, state.failed_balance_checks = now, state.failed_balance_checks + 1
save_state(account)
return {'due', now, state.last_finished_task.reservation}
