-- Settles a reservation with its outcome, by compare-and-set. An acceptance creates its task and schedules its first check.
-- USES: store, windows, account
-- KEYS     clock, tenant, reservation, leases, account, task, index of the tenant's tasks, poll:due
-- ARGV     MessagePack {reservation, tenant, account, kind, created_at, outcome, balance, account_status, keep_ms, is_late,
--          new_task, usage_prefix, reservation_prefix, idempotency_prefix, idempotency}, new_task {id,
--          options, metadata, check_interval_ms, webhook_url, trace_context}; the prefixes are those of the keys of the
--          tenant's days, of reservations, and of the tenant's idempotency keys; idempotency {key_digest, digests, keep_ms}
--          is stored even if the reservation was lost
-- RETURNS  {'settled', now}, {'final', now} if it had a final outcome before and nothing changed, {'pending', now} if
--          a late one came before the sender's own, which goes first while its lease runs, or
--          {'wrong-account', now, account} if the reservation is on another account than the caller presumed
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local tenant = load_tenant(KEYS[2])
local account = load_account(KEYS[5], args.account)
local reservation = load_reservation(KEYS[3])
local outcome = args.outcome
roll_windows(tenant, wall)

-- Recreates a reservation that Redis lost, as one of unknown outcome in the windows of its creation.
local function recreate_reservation()
  reservation.settled_at = now
  for _, window in ipairs(WINDOWS) do
    reservation.window_starts[window] = window_start(window, args.created_at)
  end
  -- It may have been made in a later period than the present one, before the server's clock stepped back.
  roll_windows(tenant, math.max(wall, args.created_at))
  apply_to_windows(tenant, reservation, 1)
  roll_windows(tenant, wall)
  apply_to_usage(tenant, args.usage_prefix, args.reservation, reservation, {}, wall)
  account.state.unknown_outcomes = account.state.unknown_outcomes + 1
  local expected = account.state.expected_drop
  expected.charges, expected.unpriced = expected.charges + 1, expected.unpriced + 1
  mark_charge_pending(account.state, reservation)
  mark_untracked(account.state, reservation, now + LATE_CHARGE_MS)
end

if reservation and reservation.account ~= args.account then
  return {'wrong-account', now, reservation.account}
elseif not reservation then
  reservation = {
    state = 'unknown', tenant = args.tenant, account = args.account, kind = args.kind,
    created_at = args.created_at, dispatched_at = math.min(args.created_at, now), lease_expires_at = args.created_at,
    submission_seq = 0, exclusive = false, settled_at = 0, window_starts = {}, money_holds = {},
  }
  if outcome == 'refused' or outcome == 'not-sent' then
    reservation.state = outcome
    save_reservation(KEYS[3], reservation, args.keep_ms)
    return {'settled', now}
  end
  local idempotency = args.idempotency
  if idempotency then
    reservation.key_digest = idempotency.key_digest
    local entry = args.reservation .. ' ' .. idempotency.digests
    redis.call('SET', args.idempotency_prefix .. idempotency.key_digest, entry, 'NX', 'PX', idempotency.keep_ms)
  end
  recreate_reservation()
  if outcome == 'unknown' then
    save_state(tenant)
    save_state(account)
    save_reservation(KEYS[3], reservation, math.max(args.created_at + args.keep_ms - wall, 1))
    return {'settled', now}
  end
end

if args.is_late and reservation.state == 'reserved' and reservation.lease_expires_at > now then
  return {'pending', now}
end
local old_outcome, state, was_expected = reservation.state, account.state, true
if (old_outcome ~= 'reserved' and old_outcome ~= 'unknown') or old_outcome == outcome then
  return {'final', now}
end
local old_usage = usage_of(reservation)
apply_to_windows(tenant, reservation, -1)
if old_outcome == 'reserved' then
  state.unsettled = state.unsettled - 1
  state.open_submissions = state.open_submissions - 1
else
  state.unknown_outcomes = state.unknown_outcomes - 1
  was_expected = resolve_untracked(state, reservation)
  if state.pending_inference and state.pending_inference.reservation == args.reservation then
    state.pending_inference = nil
  end
end
reservation.state, reservation.settled_at = outcome, now
if outcome == 'accepted' then
  state.open_submissions = state.open_submissions + 1
  reservation.balance_after = args.balance
  if reservation.refund then
    reservation.refund.count, reservation.refund.money_fen = 0, 0
  end
  open_on_acceptance(state, reservation.dispatched_at)
  if old_outcome == 'unknown' then
    mark_charge_pending(state, reservation)
    add_expected_charge(account, reservation.kind, 1)
  end
elseif outcome == 'unknown' then
  state.unknown_outcomes = state.unknown_outcomes + 1
  start_inference(state, args.reservation, reservation, now)
else
  reservation.money_holds, reservation.refund = {}, nil
  cancel_expected_charge(account, reservation, was_expected)
  if args.account_status then
    close_on_refusal(state, args.account_status, reservation.dispatched_at, now)
  end
  if reservation.key_digest then
    local entry = redis.call('GET', args.idempotency_prefix .. reservation.key_digest)
    if entry and entry:match('^%S+') == args.reservation then
      redis.call('DEL', args.idempotency_prefix .. reservation.key_digest)
    end
  end
end
apply_to_windows(tenant, reservation, 1)
apply_to_usage(tenant, args.usage_prefix, args.reservation, reservation, old_usage, wall)
observe(account, args.balance, 'submit', reservation.dispatched_at, now, reservation.kind)
if outcome == 'accepted' then
  learn_charge_timing(state, reservation, args.balance)
end
store_inference(account, args.reservation_prefix)
save_state(tenant)
save_state(account)
-- One of unknown outcome expires as if it had none, so that reset_clock.lua finds it by the day on which it was made.
save_reservation(KEYS[3], reservation, outcome ~= 'unknown' and args.keep_ms or nil)
redis.call('ZREM', KEYS[4], args.reservation)

if outcome == 'accepted' then
  local new_task, created_at = args.new_task, reservation.created_at
  local task = {
    id = new_task.id, tenant = args.tenant, account = args.account, kind = args.kind, state = 'queued', version = 1,
    created_at = created_at, updated_at = created_at, last_checked_at = created_at, options = new_task.options,
    metadata = new_task.metadata, webhook_url = new_task.webhook_url, trace_context = new_task.trace_context,
  }
  redis.call('SET', KEYS[6], cmsgpack.pack(task), 'PX', args.keep_ms)
  redis.call('ZADD', KEYS[7], created_at, args.reservation)
  redis.call('ZREMRANGEBYSCORE', KEYS[7], '-inf', wall - args.keep_ms)
  redis.call('PEXPIRE', KEYS[7], args.keep_ms)
  redis.call('ZADD', KEYS[8], now + new_task.check_interval_ms, args.reservation)
end
return {'settled', now}
