-- Records a check of a task and schedules the next one. The end of a task is recorded once, with its cost.
-- USES: store, windows, account, deliveries
-- KEYS     clock, tenant, reservation, account, task, watch, claims, interest
-- ARGV     MessagePack {reservation, account, claimed, answered, artifacts, error, lost_error, unusable_error, figures,
--          check_after, lost_after, unusable_after, keep_reservation, keep_running, keep_ended, usage, keep_usage,
--          reservations, channel, agenda}; usage and reservations are the prefixes of the keys of the tenant's days and of
--          reservations, channel is where changes of tasks are published
-- RETURNS  {'recorded', wall, the task}, {'ended', wall} if it had ended before, or {'gone', wall}

-- Returns how long after a check the next one is due (ms). A watched task is checked each time; otherwise the older it is,
-- the less often. Checks that failed in a row are repeated with exponential back-off.
local function next_check_delay(interval, age, failures, is_watched)
  if failures > 0 then
    return math.min(interval * 2 ^ failures, math.max(MAX_CHECK_BACKOFF_MS, interval))
  elseif is_watched then
    return interval
  end
  return math.max(math.min(math.floor(age / AGE_PER_CHECK_INTERVAL), MAX_CHECK_INTERVAL_MS), interval)
end

local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local task = decode(redis.call('GET', KEYS[5]))
redis.call('ZREM', KEYS[7], args.reservation)
if not task or task.finished then
  redis.call('ZREM', KEYS[6], args.reservation)
  return {task and 'ended' or 'gone', wall}
end

-- Responses without a usable state fail the task once the time between them adds up to the limit; time without a response
-- does not count. All of them add up to unusable_after, those that do not know the task also to the shorter lost_after.
local outcome, failure = args.answered, args.error
if outcome == 'not_found' or outcome == 'invalid' then
  task.useless = (task.useless or 0) + (task.useless_at and now - task.useless_at or 0)
  task.useless_at = now
  if outcome == 'not_found' then
    task.silent = (task.silent or 0) + (task.silent_at and now - task.silent_at or 0)
    task.silent_at, task.checked = now, wall
  else
    task.silent_at = nil
  end
  if outcome == 'not_found' and task.silent >= args.lost_after then
    outcome, failure = 'failed', args.lost_error
  elseif task.useless >= args.unusable_after then
    outcome, failure = 'failed', args.unusable_error
  end
elseif outcome == 'no_response' then
  task.silent_at, task.useless_at = nil, nil
else
  task.silent, task.silent_at, task.useless, task.useless_at = nil, nil, nil, nil
end

local keep_ms, old_version = args.keep_running, task.version
if outcome == 'succeeded' or outcome == 'failed' then
  local cost = {count = 0, money = 0, basis = 'unknown'}
  local reservation = load_reservation(KEYS[3])
  if reservation and reservation.state == 'accepted' and not reservation.cost then
    local tenant, account = load_tenant(KEYS[2]), load_account(KEYS[4], args.account)
    local state, figures, succeeded = account.state, args.figures, outcome == 'succeeded'
    local old_usage = usage_of(reservation)
    roll_windows(tenant, wall)
    apply_to_windows(tenant, reservation, -1)
    state.open = state.open - 1
    -- A check may return the balance as it was when the task ended, which may be as long ago as its submission. If anything
    -- else happened on the account since, the figures count as that old, unless checks return the current balance.
    local claimed_at = math.min(args.claimed, now)
    local is_current = was_exclusive(state, reservation) or state.looks
    local requested_at = is_current and claimed_at or math.min(reservation.sent, now)
    observe(account, figures, 'check', requested_at, now)
    cost = compute_cost(account, reservation, figures, succeeded)
    if succeeded then
      store_finished_task(state, args.reservation, figures, claimed_at)
    end
    finish_charge(state, reservation, figures, requested_at, now)
    reservation.holds, reservation.cost, reservation.succeeded = {}, cost, succeeded
    reservation.before, reservation.after = nil, nil
    if reservation.refund then
      reservation.refund.count, reservation.refund.money = cost.count, cost.money
    end
    apply_to_windows(tenant, reservation, 1)
    apply_to_usage(args.usage, args.reservation, reservation, old_usage, args.keep_usage)
    if not reservation.refund then
      for _, limit in ipairs(tenant.policy.limits) do
        local counter = find_counter(tenant, limit.window, reservation.periods[limit.window])
        if limit.money and counter then
          counter.overrun = counter.overrun + math.min(math.max(counter.money - limit.money, 0), cost.money)
        end
      end
    end
    store_inference(account, args.reservations)
    save_state(tenant)
    save_state(account)
    save_reservation(KEYS[3], reservation, args.keep_reservation)
  end
  task.state, task.updated, task.finished, task.checked = outcome, wall, wall, wall
  task.artifacts, task.error, task.cost, task.version = args.artifacts, failure, cost, task.version + 1
  task.silent, task.silent_at, task.useless, task.useless_at = nil, nil, nil, nil
  keep_ms = args.keep_ended
  redis.call('ZREM', KEYS[6], args.reservation)
  if task.webhook then
    local delivery = {task = task.id, tenant = task.tenant, url = task.webhook, created = wall, attempts = 0}
    enqueue_delivery(args.agenda, args.reservation, delivery, 0, now, wall)
  end
else
  if outcome == 'running' then
    task.checked = wall
    if task.state == 'queued' then
      task.state, task.updated, task.version = 'running', wall, task.version + 1
    end
  end
  local failures = (outcome == 'no_response' or outcome == 'invalid') and (task.misses or 0) + 1 or 0
  task.misses = failures > 0 and failures or nil
  local is_watched = task.webhook or redis.call('EXISTS', KEYS[8]) == 1
  local delay = next_check_delay(args.check_after, wall - task.created, failures, is_watched)
  redis.call('ZADD', KEYS[6], now + delay, args.reservation)
end
local packed = cmsgpack.pack(task)
redis.call('SET', KEYS[5], packed, 'PX', keep_ms)
if task.version > old_version then
  redis.call('PUBLISH', args.channel, cmsgpack.pack({args.reservation, wall, task}))
end
return {'recorded', wall, packed}
