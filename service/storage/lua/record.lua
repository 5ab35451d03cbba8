-- Writes what a check of a task said, and when to check again; an end is recorded once, with its receipt.
-- KEYS     clock, tenant, reservation, account, task, watch
-- ARGV     MessagePack {reservation, account, claimed, answered, artifacts, error, lost_error, unusable_error, figures,
--          check_after, lost_after, unusable_after, keep_reservation, keep_running, keep_ended, usage, keep_usage,
--          reservations}; usage and reservations are the prefixes of the keys of the tenant's days and of reservations
-- RETURNS  {'recorded', now, the task's fields and values}, {'ended', now} if it had ended before, or {'gone', now}
local ask = cmsgpack.unpack(ARGV[1])
local now = clock(KEYS[1])
local found = redis.call('HMGET', KEYS[5], 'state', 'silent', 'silent_at', 'useless', 'useless_at')
local state = found[1]
if not state or state == 'succeeded' or state == 'failed' then
  redis.call('ZREM', KEYS[6], ask.reservation)
  return {state and 'ended' or 'gone', now}
end

-- Answers that tell nothing of the task end it once they add up to long enough; time without an answer does not count.
-- All of them are useless, and those that are silent add up by themselves too, to what is much shorter.
local answered, failure = ask.answered, ask.error
if answered == 'silent' or answered == 'unusable' then
  local useless = tonumber(found[4] or 0) + (found[5] and now - tonumber(found[5]) or 0)
  local silent = tonumber(found[2] or 0)
  if answered == 'silent' then
    silent = silent + (found[3] and now - tonumber(found[3]) or 0)
    redis.call('HSET', KEYS[5], 'silent', silent, 'silent_at', now, 'checked', now)
  else
    redis.call('HDEL', KEYS[5], 'silent_at')
  end
  redis.call('HSET', KEYS[5], 'useless', useless, 'useless_at', now)
  if answered == 'silent' and silent >= ask.lost_after then
    answered, failure = 'failed', ask.lost_error
  elseif useless >= ask.unusable_after then
    answered, failure = 'failed', ask.unusable_error
  end
elseif answered == 'nothing' then
  redis.call('HDEL', KEYS[5], 'silent_at', 'useless_at')
elseif found[4] then
  redis.call('HDEL', KEYS[5], 'silent', 'silent_at', 'useless', 'useless_at')
end

if answered == 'succeeded' or answered == 'failed' then
  local cost = {count = 0, money = 0, basis = 'unknown'}
  local reservation = load_reservation(KEYS[3])
  if reservation and reservation.state == 'accepted' and not reservation.cost then
    local tenant, account = load_tenant(KEYS[2]), load_account(KEYS[4], ask.account)
    local state, figures, succeeded = account.state, ask.figures, answered == 'succeeded'
    local before = tally(reservation)
    roll(tenant, now)
    count(tenant, reservation, -1)
    state.open = state.open - 1
    local asked = (by_itself(state, reservation) or state.looks) and ask.claimed or reservation.sent
    observe(account, figures, 'check', asked, now)
    cost = receipt(account, reservation, figures, succeeded)
    if succeeded then
      finished(state, ask.reservation, figures, ask.claimed)
    end
    conclude(state, reservation, figures, now)
    reservation.holds, reservation.cost, reservation.succeeded = {}, cost, succeeded
    reservation.before, reservation.after = nil, nil
    if reservation.refund then
      reservation.refund.count, reservation.refund.money = cost.count, cost.money
    end
    count(tenant, reservation, 1)
    book(ask.usage, ask.reservation, reservation, before, ask.keep_usage)
    if not reservation.refund then
      for _, limit in ipairs(tenant.policy.limits) do
        local counter = tenant.state.windows[limit.window]
        if limit.money and reservation.periods[limit.window] == counter.period then
          counter.overrun = counter.overrun + math.min(math.max(counter.money - limit.money, 0), cost.money)
        end
      end
    end
    tell(account, ask.reservations)
    save(tenant)
    save(account)
    save_reservation(KEYS[3], reservation, ask.keep_reservation)
  end
  redis.call('HSET', KEYS[5],
    'state', answered, 'updated', now, 'finished', now, 'checked', now, 'artifacts', ask.artifacts,
    'cost_count', cost.count, 'cost_money', cost.money, 'cost_basis', cost.basis)
  if failure then
    redis.call('HSET', KEYS[5], 'error', failure)
  end
  redis.call('HINCRBY', KEYS[5], 'version', 1)
  redis.call('PEXPIRE', KEYS[5], ask.keep_ended)
  redis.call('ZREM', KEYS[6], ask.reservation)
else
  if answered == 'running' then
    redis.call('HSET', KEYS[5], 'checked', now)
    if state == 'queued' then
      redis.call('HSET', KEYS[5], 'state', 'running', 'updated', now)
      redis.call('HINCRBY', KEYS[5], 'version', 1)
    end
  end
  redis.call('PEXPIRE', KEYS[5], ask.keep_running)
  redis.call('ZADD', KEYS[6], now + ask.check_after, ask.reservation)
end
return {'recorded', now, redis.call('HGETALL', KEYS[5])}
