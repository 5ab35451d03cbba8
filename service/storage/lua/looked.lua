-- Takes in what a second check of a finished task told of its account's balance.
-- USES: store, account
-- KEYS     clock, account
-- ARGV     MessagePack {account, reservation, claimed, figures, reservations}; reservations is the prefix of their keys
-- RETURNS  {'looked', now}, or {'passed', now} if another task has become the newest meanwhile
local ask = cmsgpack.unpack(ARGV[1])
local now = clock(KEYS[1])
local account = load_account(KEYS[2], ask.account)
local state, figures = account.state, ask.figures
local newest = state.newest
if not newest or newest.reservation ~= ask.reservation then
  return {'passed', now}
end
state.in_vain = 0
local claimed = math.min(ask.claimed, now)
if not figures.count or not figures.money then
  state.newest = nil
else
  state.looks = state.looks or figures.count ~= newest.count or figures.money ~= newest.money
  if state.looks then
    newest.sent = math.max(claimed, newest.sent)
    newest.count, newest.money = figures.count, figures.money
    observe(account, figures, 'check', claimed, now)
    tell(account, ask.reservations)
  end
end
save(account)
return {'looked', now}
