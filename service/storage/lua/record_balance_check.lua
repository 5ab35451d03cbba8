-- Records the balance that a second check of the last finished task returned. If it differs from that of the first check, it
-- is the current balance: from then on checks of finished tasks are taken for balance readings. A task whose check has no
-- balance is not checked again.
-- USES: store, account
-- KEYS     clock, account
-- ARGV     MessagePack {account, reservation, claimed_at, balance, reservation_prefix}
-- RETURNS  {'recorded', now}, or {'superseded', now} if another task is the last finished one by now
local args = cmsgpack.unpack(ARGV[1])
local now = advance_clock(KEYS[1])
local account = load_account(KEYS[2], args.account)
local state, balance = account.state, args.balance
local last = state.last_finished_task
if not last or last.reservation ~= args.reservation then
  return {'superseded', now}
end
state.failed_balance_checks = 0
local claimed_at = math.min(args.claimed_at, now)
if not balance.count or not balance.money_fen then
  state.last_finished_task = nil
else
  local has_changed = balance.count ~= last.count or balance.money_fen ~= last.money_fen
  state.live_balance_checks = state.live_balance_checks or has_changed
  if state.live_balance_checks then
    last.sent_at = math.max(claimed_at, last.sent_at)
    last.count, last.money_fen = balance.count, balance.money_fen
    observe(account, balance, 'check', claimed_at, now)
    store_inference(account, args.reservation_prefix)
  end
end
save_state(account)
return {'recorded', now}
