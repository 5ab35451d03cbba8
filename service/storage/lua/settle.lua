-- Settles a reservation with its outcome, by compare-and-set. An acceptance creates its task and schedules its first check.
-- USES: store, windows, account
-- KEYS     clock, tenant, reservation, leases, account, task, index of the tenant's tasks, watch
-- ARGV     MessagePack {reservation, tenant, account, kind, created, outcome, figures, closes, keep, late, draft, usage,
--          keep_usage, reservations, keys, idempotency}, draft {id, options, metadata, check_after, webhook, trace}; usage,
--          reservations and keys are the prefixes of the keys of the tenant's days, of all reservations, and of the
--          tenant's idempotency keys; idempotency {key, content, keep} is stored even if the reservation was lost
-- RETURNS  {'settled', now}, {'final', now} if it had a final outcome before and nothing changed, {'pending', now} if
--          a late one came before the sender's own, which goes first while its lease runs, or
--          {'elsewhere', now, account} if the reservation is on another account than the caller presumed
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local tenant = load_tenant(KEYS[2])
local account = load_account(KEYS[5], args.account)
local reservation = load_reservation(KEYS[3])
local outcome = args.outcome
roll_windows(tenant, wall)

-- Recreates a reservation that Redis lost, as one of unknown outcome in the windows of its creation.
local function recreate_reservation()
  reservation.settled = now
  for _, window in ipairs(WINDOWS) do
    reservation.periods[window] = window_start(window, args.created)
  end
  apply_to_windows(tenant, reservation, 1)
  apply_to_usage(args.usage, args.reservation, reservation, {}, args.keep_usage)
  account.state.unknown = account.state.unknown + 1
  local expected = account.state.expected
  expected.tasks, expected.unpriced = expected.tasks + 1, expected.unpriced + 1
  mark_charge_pending(account.state, reservation)
  mark_untracked(account.state, reservation, now + LATE_CHARGE_MS)
end

if reservation and reservation.account ~= args.account then
  return {'elsewhere', now, reservation.account}
elseif not reservation then
  reservation = {
    state = 'unknown', tenant = args.tenant, account = args.account, kind = args.kind, created = args.created,
    sent = math.min(args.created, now), lease = args.created, seq = 0, alone = false, settled = 0, periods = {}, holds = {},
  }
  if outcome == 'refused' or outcome == 'not-sent' then
    reservation.state = outcome
    save_reservation(KEYS[3], reservation, args.keep)
    return {'settled', now}
  end
  local idempotency = args.idempotency
  if idempotency then
    reservation.key = idempotency.key
    local entry = args.reservation .. ' ' .. idempotency.content
    redis.call('SET', args.keys .. idempotency.key, entry, 'NX', 'PX', idempotency.keep)
  end
  recreate_reservation()
  if outcome == 'unknown' then
    save_state(tenant)
    save_state(account)
    save_reservation(KEYS[3], reservation, args.keep)
    return {'settled', now}
  end
end

if args.late and reservation.state == 'reserved' and reservation.lease > now then
  return {'pending', now}
end
local old_outcome, state, was_expected = reservation.state, account.state, true
if (old_outcome ~= 'reserved' and old_outcome ~= 'unknown') or old_outcome == outcome then
  return {'final', now}
end
local old_usage = usage_of(reservation)
apply_to_windows(tenant, reservation, -1)
if old_outcome == 'reserved' then
  state.sending = state.sending - 1
  state.open = state.open - 1
else
  state.unknown = state.unknown - 1
  was_expected = resolve_untracked(state, reservation)
  if state.doubt and state.doubt.reservation == args.reservation then
    state.doubt = nil
  end
end
reservation.state, reservation.settled = outcome, now
if outcome == 'accepted' then
  state.open = state.open + 1
  reservation.after = args.figures
  if reservation.refund then
    reservation.refund.count, reservation.refund.money = 0, 0
  end
  open_on_acceptance(state, reservation.sent)
  if old_outcome == 'unknown' then
    mark_charge_pending(state, reservation)
    add_expected_charge(account, reservation.kind, 1)
  end
elseif outcome == 'unknown' then
  state.unknown = state.unknown + 1
  start_inference(state, args.reservation, reservation, now)
else
  reservation.holds, reservation.refund = {}, nil
  cancel_expected_charge(account, reservation, was_expected)
  if args.closes then
    close_on_refusal(state, args.closes, reservation.sent, now)
  end
  if reservation.key then
    local entry = redis.call('GET', args.keys .. reservation.key)
    if entry and entry:match('^%S+') == args.reservation then
      redis.call('DEL', args.keys .. reservation.key)
    end
  end
end
apply_to_windows(tenant, reservation, 1)
apply_to_usage(args.usage, args.reservation, reservation, old_usage, args.keep_usage)
observe(account, args.figures, 'submit', reservation.sent, now, reservation.kind)
if outcome == 'accepted' then
  learn_charge_timing(state, reservation, args.figures)
end
store_inference(account, args.reservations)
save_state(tenant)
save_state(account)
save_reservation(KEYS[3], reservation, args.keep)
redis.call('ZREM', KEYS[4], args.reservation)

if outcome == 'accepted' then
  local draft, created = args.draft, reservation.created
  local task = {
    id = draft.id, tenant = args.tenant, account = args.account, kind = args.kind, state = 'queued', created = created,
    updated = created, checked = created, version = 1, options = draft.options, metadata = draft.metadata,
    webhook = draft.webhook, trace = draft.trace,
  }
  redis.call('SET', KEYS[6], cmsgpack.pack(task), 'PX', args.keep)
  redis.call('ZADD', KEYS[7], created, args.reservation)
  redis.call('ZREMRANGEBYSCORE', KEYS[7], '-inf', wall - args.keep)
  redis.call('PEXPIRE', KEYS[7], args.keep)
  redis.call('ZADD', KEYS[8], now + draft.check_after, args.reservation)
end
return {'settled', now}
