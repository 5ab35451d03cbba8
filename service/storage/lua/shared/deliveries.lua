-- The deliveries: what tenants are told, in a queue for each receiver. Receivers take turns, and one that fails has but one
-- delivery under way, so that none of them holds up another, however much waits for it.
--
-- An agenda is {receivers, queue, claims, failing, delivery, failed, keep, at_once, failing_for}: keys, or how those of each
-- receiver or delivery begin, for how long all of that is kept, how many a receiver has under way at once, and for how long
-- it counts as failing.

-- As service/domain/webhook.py has it.
local function receiver_of(delivery)
  local host = delivery.url:match('^%a+://([^/:?]+)')
  if host:sub(1, 1) == '[' or host:match('^[%d.]+$') then
    host = 'ip'
  end
  return string.format('%d:%s', delivery.tenant, host)
end

local function at_once(agenda, receiver, now)
  local failing = tonumber(redis.call('GET', agenda.failing .. receiver) or 0)
  return failing > now and 1 or agenda.at_once
end

local function first(key)
  local found = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  return found[2] and tonumber(found[2])
end

-- Has a receiver's turn come when its next delivery may be taken: one that waits, or one whose lease runs out.
local function take_turn(agenda, receiver, now)
  local queue, claims = agenda.queue .. receiver, agenda.claims .. receiver
  local due, lapses = first(queue), first(claims)
  if due and redis.call('ZCARD', claims) >= at_once(agenda, receiver, now) then
    due = nil
  end
  if due or lapses then
    redis.call('ZADD', agenda.receivers, math.min(due or lapses, lapses or due), receiver)
  else
    redis.call('ZREM', agenda.receivers, receiver)
  end
  for _, key in ipairs({agenda.receivers, queue, claims}) do
    redis.call('PEXPIRE', key, agenda.keep)
  end
end

local function save_delivery(agenda, id, delivery)
  redis.call('SET', agenda.delivery .. id, cmsgpack.pack(delivery), 'PX', agenda.keep)
end

-- Has a delivery sent after a while.
local function enqueue(agenda, id, delivery, wait, now, wall)
  local receiver = receiver_of(delivery)
  delivery.state, delivery.updated, delivery.due = 'pending', wall, wall + wait
  save_delivery(agenda, id, delivery)
  redis.call('ZADD', agenda.queue .. receiver, now + wait, id)
  take_turn(agenda, receiver, now)
end
