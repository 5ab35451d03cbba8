-- Forgets that an account was closed, and its figures, so that the next submission finds out.
-- KEYS     account
-- ARGV     MessagePack {account}
-- RETURNS  {'reopened'}
local ask = cmsgpack.unpack(ARGV[1])
local account = load_account(KEYS[1], ask.account)
account.state.status = 'open'
account.state.probe_at = 0
account.state.closed = 0
account.state.count = nil
account.state.money = nil
save(account)
return {'reopened'}
