-- Writes what a check of a task said, and when to check again; an end is recorded once, with its receipt.
-- USES: store, windows, account, deliveries
-- KEYS     clock, tenant, reservation, account, task, watch, claims, interest
-- ARGV     MessagePack {reservation, account, claimed, answered, artifacts, error, lost_error, unusable_error, figures,
--          check_after, lost_after, unusable_after, keep_reservation, keep_running, keep_ended, usage, keep_usage,
--          reservations, channel, agenda}; usage and reservations are the prefixes of the keys of the tenant's days and of
--          reservations, channel is where what can be seen of the task is announced
-- RETURNS  {'recorded', wall, the task}, {'ended', wall} if it had ended before, or {'gone', wall}

-- How long after a check the next one is due, as service/domain/checks.py has it.
local function check_after(poll, age, misses, interesting)
  if misses > 0 then
    return math.min(poll * 2 ^ misses, math.max(MAX_CHECK_BACKOFF_MS, poll))
  elseif interesting then
    return poll
  end
  return math.max(math.min(math.floor(age / AGE_PER_CHECK_INTERVAL), MAX_CHECK_INTERVAL_MS), poll)
end

local ask = cmsgpack.unpack(ARGV[1])
local now, wall = clock(KEYS[1])
local task = unpacked(redis.call('GET', KEYS[5]))
redis.call('ZREM', KEYS[7], ask.reservation)
if not task or task.finished then
  redis.call('ZREM', KEYS[6], ask.reservation)
  return {task and 'ended' or 'gone', wall}
end

-- Answers that tell nothing of the task end it once they add up to long enough; time without an answer does not count.
-- All of them are useless, and those that are silent add up by themselves too, to what is much shorter.
local answered, failure = ask.answered, ask.error
if answered == 'not_found' or answered == 'invalid' then
  task.useless = (task.useless or 0) + (task.useless_at and now - task.useless_at or 0)
  task.useless_at = now
  if answered == 'not_found' then
    task.silent = (task.silent or 0) + (task.silent_at and now - task.silent_at or 0)
    task.silent_at, task.checked = now, wall
  else
    task.silent_at = nil
  end
  if answered == 'not_found' and task.silent >= ask.lost_after then
    answered, failure = 'failed', ask.lost_error
  elseif task.useless >= ask.unusable_after then
    answered, failure = 'failed', ask.unusable_error
  end
elseif answered == 'no_response' then
  task.silent_at, task.useless_at = nil, nil
else
  task.silent, task.silent_at, task.useless, task.useless_at = nil, nil, nil, nil
end

local keep, version = ask.keep_running, task.version
if answered == 'succeeded' or answered == 'failed' then
  local cost = {count = 0, money = 0, basis = 'unknown'}
  local reservation = load_reservation(KEYS[3])
  if reservation and reservation.state == 'accepted' and not reservation.cost then
    local tenant, account = load_tenant(KEYS[2]), load_account(KEYS[4], ask.account)
    local state, figures, succeeded = account.state, ask.figures, answered == 'succeeded'
    local before = tally(reservation)
    roll(tenant, wall)
    count(tenant, reservation, -1)
    state.open = state.open - 1
    local claimed = math.min(ask.claimed, now)
    local asked = (by_itself(state, reservation) or state.looks) and claimed or math.min(reservation.sent, now)
    observe(account, figures, 'check', asked, now)
    cost = receipt(account, reservation, figures, succeeded)
    if succeeded then
      finished(state, ask.reservation, figures, claimed)
    end
    conclude(state, reservation, figures, asked, now)
    reservation.holds, reservation.cost, reservation.succeeded = {}, cost, succeeded
    reservation.before, reservation.after = nil, nil
    if reservation.refund then
      reservation.refund.count, reservation.refund.money = cost.count, cost.money
    end
    count(tenant, reservation, 1)
    book(ask.usage, ask.reservation, reservation, before, ask.keep_usage)
    if not reservation.refund then
      for _, limit in ipairs(tenant.policy.limits) do
        local counter = counter_of(tenant, limit.window, reservation.periods[limit.window])
        if limit.money and counter then
          counter.overrun = counter.overrun + math.min(math.max(counter.money - limit.money, 0), cost.money)
        end
      end
    end
    tell(account, ask.reservations)
    save(tenant)
    save(account)
    save_reservation(KEYS[3], reservation, ask.keep_reservation)
  end
  task.state, task.updated, task.finished, task.checked = answered, wall, wall, wall
  task.artifacts, task.error, task.cost, task.version = ask.artifacts, failure, cost, task.version + 1
  task.silent, task.silent_at, task.useless, task.useless_at = nil, nil, nil, nil
  keep = ask.keep_ended
  redis.call('ZREM', KEYS[6], ask.reservation)
  if task.webhook then
    local delivery = {task = task.id, tenant = task.tenant, url = task.webhook, created = wall, attempts = 0}
    enqueue(ask.agenda, ask.reservation, delivery, 0, now, wall)
  end
else
  if answered == 'running' then
    task.checked = wall
    if task.state == 'queued' then
      task.state, task.updated, task.version = 'running', wall, task.version + 1
    end
  end
  local misses = (answered == 'no_response' or answered == 'invalid') and (task.misses or 0) + 1 or 0
  task.misses = misses > 0 and misses or nil
  local interesting = task.webhook or redis.call('EXISTS', KEYS[8]) == 1
  local wait = check_after(ask.check_after, wall - task.created, misses, interesting)
  redis.call('ZADD', KEYS[6], now + wait, ask.reservation)
end
local packed = cmsgpack.pack(task)
redis.call('SET', KEYS[5], packed, 'PX', keep)
if task.version > version then
  redis.call('PUBLISH', ask.channel, cmsgpack.pack({ask.reservation, wall, task}))
end
return {'recorded', wall, packed}
