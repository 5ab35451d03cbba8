-- Forgets that an account was closed, and its figures, so that the next submission finds out. What was sent before says
-- nothing of it any more.
-- USES: store
-- KEYS     clock, account
-- ARGV     MessagePack {account}
-- RETURNS  {'reopened'}
local ask = cmsgpack.unpack(ARGV[1])
local account = load_account(KEYS[2], ask.account)
account.state.status = 'open'
account.state.probe_at = 0
account.state.closed = 0
account.state.reopened = clock(KEYS[1])
account.state.count = nil
account.state.money = nil
save(account)
return {'reopened'}
