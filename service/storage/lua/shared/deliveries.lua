-- The queues of webhook deliveries: one for each host of each tenant, so that a slow or failing receiver delays no other.
-- Queues are served in the order of their next due time. A receiver that has just failed gets one delivery at a time.
--
-- Each function takes as `deliveries` {queues, failed, due_prefix, claimed_prefix, failing_prefix, delivery_prefix, keep_ms,
-- max_concurrent, failing_ms}: the keys of all queues by due time and of failed deliveries; the prefixes of the keys of a
-- queue's due and claimed deliveries, of its mark as failing, and of deliveries; how long these are kept, how many of a
-- queue may be claimed at once, and how long a queue counts as failing.

-- Returns the name of a delivery's queue. Ports make no difference and hosts without a name share one queue, so that a
-- tenant has no more queues than names it may use.
local function queue_of(delivery)
  local host = delivery.url:match('^%a+://([^/:?]+)')
  if host:sub(1, 1) == '[' or host:match('^[%d.]+$') then
    host = 'ip'
  end
  return string.format('%d:%s', delivery.tenant, host)
end

local function max_concurrent(deliveries, queue, now)
  local failing_until = tonumber(redis.call('GET', deliveries.failing_prefix .. queue) or 0)
  return failing_until > now and 1 or deliveries.max_concurrent
end

local function first_score(key)
  local rows = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  return rows[2] and tonumber(rows[2])
end

-- Sets a queue's next due time: when its next delivery may be claimed, or when the next lease of a claimed one expires.
local function schedule_queue(deliveries, queue, now)
  local waiting, claimed = deliveries.due_prefix .. queue, deliveries.claimed_prefix .. queue
  local due_at, lease_expires_at = first_score(waiting), first_score(claimed)
  if due_at and redis.call('ZCARD', claimed) >= max_concurrent(deliveries, queue, now) then
    due_at = nil
  end
  if due_at or lease_expires_at then
    redis.call('ZADD', deliveries.queues, math.min(due_at or lease_expires_at, lease_expires_at or due_at), queue)
  else
    redis.call('ZREM', deliveries.queues, queue)
  end
  for _, key in ipairs({deliveries.queues, waiting, claimed}) do
    redis.call('PEXPIRE', key, deliveries.keep_ms)
  end
end

local function save_delivery(deliveries, id, delivery)
  redis.call('SET', deliveries.delivery_prefix .. id, cmsgpack.pack(delivery), 'PX', deliveries.keep_ms)
end

-- Puts a delivery into its queue, due after a delay (ms).
local function enqueue_delivery(deliveries, id, delivery, delay, now, wall)
  local queue = queue_of(delivery)
  delivery.state, delivery.updated_at, delivery.next_attempt_at = 'pending', wall, wall + delay
  save_delivery(deliveries, id, delivery)
  redis.call('ZADD', deliveries.due_prefix .. queue, now + delay, id)
  schedule_queue(deliveries, queue, now)
end
