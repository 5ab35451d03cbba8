-- Records the balance that a second check of the last finished task returned. If it differs from that of the first check, it
-- is the current balance: from then on checks of finished tasks are taken for balance readings. A task whose check has no
-- figures is not checked again.
-- USES: store, account
-- KEYS     clock, account
-- ARGV     MessagePack {account, reservation, claimed, figures, reservations}; reservations is the prefix of their keys
-- RETURNS  {'looked', now}, or {'passed', now} if another task is the last finished one by now
local args = cmsgpack.unpack(ARGV[1])
local now = advance_clock(KEYS[1])
local account = load_account(KEYS[2], args.account)
local state, figures = account.state, args.figures
local last = state.newest
if not last or last.reservation ~= args.reservation then
  return {'passed', now}
end
state.in_vain = 0
local claimed_at = math.min(args.claimed, now)
if not figures.count or not figures.money then
  state.newest = nil
else
  state.looks = state.looks or figures.count ~= last.count or figures.money ~= last.money
  if state.looks then
    last.sent = math.max(claimed_at, last.sent)
    last.count, last.money = figures.count, figures.money
    observe(account, figures, 'check', claimed_at, now)
    store_inference(account, args.reservations)
  end
end
save_state(account)
return {'looked', now}
