-- Gives a reservation its outcome, by compare-and-set; an acceptance writes its task in the same breath.
-- USES: store, windows, account
-- KEYS     clock, tenant, reservation, leases, account, task, index of the tenant's tasks, watch
-- ARGV     MessagePack {reservation, tenant, account, kind, created, outcome, figures, closes, keep, late, draft, usage,
--          keep_usage, reservations, keys, idempotency}, draft {id, options, metadata, check_after, webhook, trace}; usage, reservations
--          and keys are the prefixes of the keys of the tenant's days, of all reservations, and of the tenant's
--          idempotency keys, idempotency {key, content, keep} is kept even if the reservation was lost
-- RETURNS  {'settled', now}, {'final', now} if it had a final outcome before and nothing changed, {'pending', now} if
--          a late one came before the sender's own, which goes first while its lease runs, or
--          {'elsewhere', now, account} if the reservation is on another account than the caller thought
local ask = cmsgpack.unpack(ARGV[1])
local now, wall = clock(KEYS[1])
local tenant = load_tenant(KEYS[2])
local account = load_account(KEYS[5], ask.account)
local reservation = load_reservation(KEYS[3])
local outcome = ask.outcome
roll(tenant, wall)

if reservation and reservation.account ~= ask.account then
  return {'elsewhere', now, reservation.account}
elseif not reservation then
  reservation = {
    state = 'unknown', tenant = ask.tenant, account = ask.account, kind = ask.kind, created = ask.created,
    sent = math.min(ask.created, now), lease = ask.created, seq = 0, alone = false, settled = 0, periods = {}, holds = {},
  }
  if outcome == 'refused' or outcome == 'not-sent' then
    reservation.state = outcome
    save_reservation(KEYS[3], reservation, ask.keep)
    return {'settled', now}
  end
  local idempotency = ask.idempotency
  if idempotency then
    reservation.key = idempotency.key
    local kept = ask.reservation .. ' ' .. idempotency.content
    redis.call('SET', ask.keys .. idempotency.key, kept, 'NX', 'PX', idempotency.keep)
  end
  reservation.settled = now
  for _, window in ipairs(WINDOWS) do
    reservation.periods[window] = period_of(window, ask.created)
  end
  count(tenant, reservation, 1)
  book(ask.usage, ask.reservation, reservation, {}, ask.keep_usage)
  account.state.unknown = account.state.unknown + 1
  local expected = account.state.expected
  expected.tasks, expected.unpriced = expected.tasks + 1, expected.unpriced + 1
  owe(account.state, reservation)
  stray(account.state, reservation, now + LATE_CHARGE_MS)
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
local was, state, lacked = reservation.state, account.state, true
if (was ~= 'reserved' and was ~= 'unknown') or was == outcome then
  return {'final', now}
end
local before = tally(reservation)
count(tenant, reservation, -1)
if was == 'reserved' then
  state.sending = state.sending - 1
  state.open = state.open - 1
else
  state.unknown = state.unknown - 1
  lacked = found(state, reservation)
  if state.doubt and state.doubt.reservation == ask.reservation then
    state.doubt = nil
  end
end
reservation.state, reservation.settled = outcome, now
if outcome == 'accepted' then
  state.open = state.open + 1
  reservation.after = ask.figures
  if reservation.refund then
    reservation.refund.count, reservation.refund.money = 0, 0
  end
  accept(state, reservation.sent)
  if was == 'unknown' then
    owe(state, reservation)
    expect(account, reservation.kind, 1)
  end
elseif outcome == 'unknown' then
  state.unknown = state.unknown + 1
  wonder(state, ask.reservation, reservation, now)
else
  reservation.holds, reservation.refund = {}, nil
  spare(account, reservation, lacked)
  if ask.closes then
    refuse(state, ask.closes, reservation.sent, now)
  end
  if reservation.key then
    local kept = redis.call('GET', ask.keys .. reservation.key)
    if kept and kept:match('^%S+') == ask.reservation then
      redis.call('DEL', ask.keys .. reservation.key)
    end
  end
end
count(tenant, reservation, 1)
book(ask.usage, ask.reservation, reservation, before, ask.keep_usage)
observe(account, ask.figures, 'submit', reservation.sent, now, reservation.kind)
if outcome == 'accepted' then
  learn(state, reservation, ask.figures)
end
tell(account, ask.reservations)
save(tenant)
save(account)
save_reservation(KEYS[3], reservation, ask.keep)
redis.call('ZREM', KEYS[4], ask.reservation)

if outcome == 'accepted' then
  local draft = ask.draft
  local at = reservation.created
  local task = {
    id = draft.id, tenant = ask.tenant, account = ask.account, kind = ask.kind, state = 'queued', created = at,
    updated = at, checked = at, version = 1, options = draft.options, metadata = draft.metadata,
    webhook = draft.webhook, trace = draft.trace,
  }
  redis.call('SET', KEYS[6], cmsgpack.pack(task), 'PX', ask.keep)
  redis.call('ZADD', KEYS[7], reservation.created, ask.reservation)
  redis.call('ZREMRANGEBYSCORE', KEYS[7], '-inf', wall - ask.keep)
  redis.call('PEXPIRE', KEYS[7], ask.keep)
  redis.call('ZADD', KEYS[8], now + draft.check_after, ask.reservation)
end
return {'settled', now}
