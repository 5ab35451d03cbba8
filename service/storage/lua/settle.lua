-- Gives a reservation its outcome, by compare-and-set; an acceptance writes its task in the same breath.
-- KEYS     clock, tenant, reservation, leases, account, task, index of the tenant's tasks, watch
-- ARGV     MessagePack {reservation, tenant, account, kind, created, outcome, figures, closes, keep, late,
--          draft}, draft {id, options, metadata, check_after}
-- RETURNS  {'settled', now}, {'final', now} if it had a final outcome before and nothing changed, {'pending', now} if
--          a late one came before the sender's own, which goes first while its lease runs, or
--          {'elsewhere', now, account} if the reservation is on another account than the caller thought
local ask = cmsgpack.unpack(ARGV[1])
local now = clock(KEYS[1])
local tenant = load_tenant(KEYS[2])
local account = load_account(KEYS[5], ask.account)
local reservation = load_reservation(KEYS[3])
local outcome = ask.outcome
roll(tenant, now)

if reservation and reservation.account ~= ask.account then
  return {'elsewhere', now, reservation.account}
elseif not reservation then
  reservation = {
    state = 'unknown', tenant = ask.tenant, account = ask.account, kind = ask.kind, created = ask.created,
    sent = ask.created, lease = ask.created, seq = 0, alone = false, ended = false, periods = {}, holds = {},
  }
  if outcome == 'refused' or outcome == 'not-sent' then
    reservation.state = outcome
    save_reservation(KEYS[3], reservation, ask.keep)
    return {'settled', now}
  end
  for _, window in ipairs(WINDOWS) do
    reservation.periods[window] = period_of(window, ask.created)
  end
  book(tenant, reservation, {tasks = 1})
  account.state.unknown = account.state.unknown + 1
  if outcome == 'unknown' then
    save(tenant)
    save(account)
    save_reservation(KEYS[3], reservation, ask.keep)
    return {'settled', now}
  end
end

if ask.late and reservation.state == 'reserved' and reservation.lease > now then
  return {'pending', now}
end
local was = reservation.state
if (was ~= 'reserved' and was ~= 'unknown') or was == outcome then
  return {'final', now}
end
if was == 'reserved' then
  tenant.state.active = tenant.state.active - 1
  book(tenant, reservation, {tasks_reserved = -1})
  book_money(tenant, reservation, 'money_reserved', -1)
  account.state.sending = account.state.sending - 1
  account.state.open = account.state.open - 1
else
  book(tenant, reservation, {tasks = -1})
  book_money(tenant, reservation, 'money', -1)
  account.state.unknown = account.state.unknown - 1
end
if outcome == 'accepted' then
  tenant.state.active = tenant.state.active + 1
  book(tenant, reservation, {tasks = 1})
  book_money(tenant, reservation, 'money_reserved', 1)
  account.state.open = account.state.open + 1
  accept(account, reservation, ask.figures)
  reservation.after = ask.figures
elseif outcome == 'unknown' then
  book(tenant, reservation, {tasks = 1})
  book_money(tenant, reservation, 'money', 1)
  account.state.unknown = account.state.unknown + 1
elseif ask.closes then
  refuse(account, ask.closes, reservation.sent, now)
end
observe(account, ask.figures, 'submit', reservation.sent, now)
reservation.state = outcome
save(tenant)
save(account)
save_reservation(KEYS[3], reservation, ask.keep)
redis.call('ZREM', KEYS[4], ask.reservation)

if outcome == 'accepted' then
  local draft = ask.draft
  redis.call('HSET', KEYS[6],
    'id', draft.id, 'tenant', ask.tenant, 'account', ask.account, 'kind', ask.kind, 'state', 'queued',
    'created', reservation.created, 'updated', reservation.created, 'checked', reservation.created, 'version', 1,
    'options', draft.options, 'metadata', draft.metadata)
  redis.call('PEXPIRE', KEYS[6], ask.keep)
  redis.call('ZADD', KEYS[7], reservation.created, ask.reservation)
  redis.call('ZREMRANGEBYSCORE', KEYS[7], '-inf', now - ask.keep)
  redis.call('PEXPIRE', KEYS[7], ask.keep)
  redis.call('ZADD', KEYS[8], now + draft.check_after, ask.reservation)
end
return {'settled', now}
