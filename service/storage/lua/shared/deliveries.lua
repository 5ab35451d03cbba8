-- The queues of webhook deliveries: one for each host of each tenant, so that a slow or failing receiver delays no other.
-- Queues are served in the order of their next due time. A receiver that has just failed gets one delivery at a time.
--
-- Each function takes as `agenda` {receivers, queue, claims, failing, delivery, failed, keep, at_once, failing_for}: the keys
-- of all queues by due time and of failed deliveries; the prefixes of a queue's waiting and claimed deliveries, of its
-- failing mark, and of deliveries; how long these are kept (ms), how many of a queue may be claimed at once, and how long a
-- queue counts as failing (ms).

-- Returns the name of a delivery's queue. Ports make no difference and hosts without a name share one queue, so that a
-- tenant has no more queues than names it may use.
local function queue_of(delivery)
  local host = delivery.url:match('^%a+://([^/:?]+)')
  if host:sub(1, 1) == '[' or host:match('^[%d.]+$') then
    host = 'ip'
  end
  return string.format('%d:%s', delivery.tenant, host)
end

local function max_concurrent(agenda, queue, now)
  local failing_until = tonumber(redis.call('GET', agenda.failing .. queue) or 0)
  return failing_until > now and 1 or agenda.at_once
end

local function first_score(key)
  local rows = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  return rows[2] and tonumber(rows[2])
end

-- Sets a queue's next due time: when its next delivery may be claimed, or when the next lease of a claimed one expires.
local function schedule_queue(agenda, queue, now)
  local waiting, claimed = agenda.queue .. queue, agenda.claims .. queue
  local due_at, lease_expires_at = first_score(waiting), first_score(claimed)
  if due_at and redis.call('ZCARD', claimed) >= max_concurrent(agenda, queue, now) then
    due_at = nil
  end
  if due_at or lease_expires_at then
    redis.call('ZADD', agenda.receivers, math.min(due_at or lease_expires_at, lease_expires_at or due_at), queue)
  else
    redis.call('ZREM', agenda.receivers, queue)
  end
  for _, key in ipairs({agenda.receivers, waiting, claimed}) do
    redis.call('PEXPIRE', key, agenda.keep)
  end
end

local function save_delivery(agenda, id, delivery)
  redis.call('SET', agenda.delivery .. id, cmsgpack.pack(delivery), 'PX', agenda.keep)
end

-- Puts a delivery into its queue, due after a delay (ms).
local function enqueue_delivery(agenda, id, delivery, delay, now, wall)
  local queue = queue_of(delivery)
  delivery.state, delivery.updated, delivery.due = 'pending', wall, wall + delay
  save_delivery(agenda, id, delivery)
  redis.call('ZADD', agenda.queue .. queue, now + delay, id)
  schedule_queue(agenda, queue, now)
end
