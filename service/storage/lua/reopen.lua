-- Reopens an account and forgets its balance, so that the next submission tries it. Responses to what was sent before are
-- no observation of it any more.
-- USES: store
-- KEYS     clock, account
-- ARGV     MessagePack {account}
-- RETURNS  {'reopened'}
local args = cmsgpack.unpack(ARGV[1])
local account = load_account(KEYS[2], args.account)
account.state.status = 'open'
account.state.next_probe_at = 0
account.state.closed_at = 0
account.state.reopened_at = advance_clock(KEYS[1])
account.state.count = nil
account.state.money = nil
save_state(account)
return {'reopened'}
