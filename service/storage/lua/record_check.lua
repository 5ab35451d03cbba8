-- Records a check of a task and schedules the next one. The end of a task is recorded once, with its cost.
-- USES: store, windows, account, deliveries, checks
-- KEYS     clock, tenant, reservation, account, task, poll:due, poll:claimed, poll:watched:reservation
-- ARGV     MessagePack {reservation, account, claimed_at, outcome, artifacts, error, balance, check_interval_ms, keep_ms,
--          keep_finished_ms, usage_prefix, reservation_prefix, channel, unresolved, deliveries}; usage_prefix is that of the
--          keys of the tenant's days, channel is where changes of tasks are published; unresolved {lost_after_ms, lost_error,
--          unusable_after_ms, unusable_error} is nil unless the outcome is not_found or invalid, and deliveries, as in
--          shared/deliveries.lua, without a webhook
-- RETURNS  {'recorded', wall, the task}, {'already-finished', wall}, or {'not-found', wall} if there is no such task

local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local task = decode(redis.call('GET', KEYS[5]))
redis.call('ZREM', KEYS[7], args.reservation)
if not task or task.finished_at then
  redis.call('ZREM', KEYS[6], args.reservation)
  return {task and 'already-finished' or 'not-found', wall}
end

-- Responses without a usable state fail the task once the time between them adds up to the limit; time without a response
-- does not count. All of them add up to unusable_after_ms, those that do not know the task also to lost_after_ms.
local outcome, failure = args.outcome, args.error
if outcome == 'not_found' or outcome == 'invalid' then
  task.unresolved_ms = (task.unresolved_ms or 0) + (task.unresolved_at and now - task.unresolved_at or 0)
  task.unresolved_at = now
  if outcome == 'not_found' then
    task.not_found_ms = (task.not_found_ms or 0) + (task.not_found_at and now - task.not_found_at or 0)
    task.not_found_at, task.last_checked_at = now, wall
  else
    task.not_found_at = nil
  end
  local limits = args.unresolved
  if outcome == 'not_found' and task.not_found_ms >= limits.lost_after_ms then
    outcome, failure = 'failed', limits.lost_error
  elseif task.unresolved_ms >= limits.unusable_after_ms then
    outcome, failure = 'failed', limits.unusable_error
  end
elseif outcome == 'no_response' then
  task.not_found_at, task.unresolved_at = nil, nil
else
  task.not_found_ms, task.not_found_at, task.unresolved_ms, task.unresolved_at = nil, nil, nil, nil
end

local keep_ms, old_version = args.keep_ms, task.version
if outcome == 'succeeded' or outcome == 'failed' then
  local cost = {count = 0, money_fen = 0, basis = 'unknown'}
  local reservation = load_reservation(KEYS[3])
  if reservation and reservation.state == 'accepted' and not reservation.cost then
    local tenant, account = load_tenant(KEYS[2], reservation.kind), load_account(KEYS[4], args.account)
    local state, balance, succeeded = account.state, args.balance, outcome == 'succeeded'
    local old_usage = usage_of(reservation)
    roll_windows(tenant, wall)
    apply_to_windows(tenant, reservation, -1)
    state.open_submissions = state.open_submissions - 1
    -- A check may return the balance as it was when the task ended, which may be as long ago as its submission. If anything
    -- else happened on the account since, the balance counts as that old, unless checks return the current balance.
    local claimed_at = math.min(args.claimed_at, now)
    local is_current = was_exclusive(state, reservation) or state.live_balance_checks
    local requested_at = is_current and claimed_at or math.min(reservation.dispatched_at, now)
    observe(account, balance, 'check', requested_at, now)
    cost = compute_cost(account, reservation, balance, succeeded)
    if succeeded then
      store_finished_task(state, args.reservation, balance, claimed_at)
    end
    finish_charge(state, reservation, balance, requested_at, now)
    reservation.money_holds, reservation.cost, reservation.succeeded = {}, cost, succeeded
    reservation.balance_before, reservation.balance_after = nil, nil
    if reservation.refund then
      reservation.refund.count, reservation.refund.money_fen = cost.count, cost.money_fen
    end
    apply_to_windows(tenant, reservation, 1)
    if not reservation.refund then
      for _, limit in ipairs(tenant.policy.limits) do
        local counter = find_counter(tenant, limit.window, reservation.window_starts[limit.window])
        if limit.money_fen and counter then
          local overrun = math.min(math.max(counter.money_fen - limit.money_fen, 0), cost.money_fen)
          counter.overrun_fen = counter.overrun_fen + overrun
          -- Of several limits, that which is passed the most: the usage counts each fen once.
          reservation.overrun_fen = overrun > (reservation.overrun_fen or 0) and overrun or reservation.overrun_fen
        end
      end
    end
    apply_to_usage(tenant, args.usage_prefix, args.reservation, reservation, old_usage, wall)
    store_inference(account, args.reservation_prefix)
    save_state(tenant)
    save_state(account)
    save_reservation(KEYS[3], reservation, args.keep_ms)
  end
  task.state, task.updated_at, task.finished_at, task.last_checked_at = outcome, wall, wall, wall
  task.artifacts, task.error, task.cost, task.version = args.artifacts, failure, cost, task.version + 1
  task.not_found_ms, task.not_found_at, task.unresolved_ms, task.unresolved_at = nil, nil, nil, nil
  keep_ms = args.keep_finished_ms
  redis.call('ZREM', KEYS[6], args.reservation)
  if task.webhook_url then
    local delivery = {task_id = task.id, tenant = task.tenant, url = task.webhook_url, created_at = wall, attempts = 0}
    enqueue_delivery(args.deliveries, args.reservation, delivery, 0, now, wall)
  end
else
  if outcome == 'running' then
    apply_running(task, wall)
  else
    local has_failed = outcome == 'no_response' or outcome == 'invalid'
    task.failed_checks = has_failed and (task.failed_checks or 0) + 1 or nil
  end
  redis.call('ZADD', KEYS[6], next_check_at(task, KEYS[8], args.check_interval_ms, now, wall), args.reservation)
end
return {'recorded', wall, save_task(KEYS[5], args.reservation, task, old_version, keep_ms, args.channel, wall)}
