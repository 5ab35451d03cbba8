-- Records the result of an attempt to deliver. A success is recorded whichever process holds the claim by now.
-- USES: store, deliveries
-- KEYS     clock, receivers
-- ARGV     MessagePack {id, leased, state, attempts, wait, status, error, answer, keep_delivered, agenda}: leased is when
--          the lease of the claim expires, attempts how many were made (0 or 1), wait after how long to try again (ms)
-- RETURNS  {'recorded', now}, {'final', now} if the delivery has its result, or {'lapsed', now} if it was claimed again
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local agenda, id = args.agenda, args.id
local delivery = decode(redis.call('GET', agenda.delivery .. id))
if not delivery or delivery.state ~= 'pending' then
  return {'final', now}
end
local queue = queue_of(delivery)
local claimed = agenda.claims .. queue
local lease_expires_at = tonumber(redis.call('ZSCORE', claimed, id) or 0)
if args.state ~= 'delivered' and lease_expires_at ~= args.leased then
  return {'lapsed', now}
end
redis.call('ZREM', claimed, id)
redis.call('ZREM', agenda.queue .. queue, id)
delivery.state, delivery.updated, delivery.due = args.state, wall, nil
delivery.attempts = delivery.attempts + args.attempts
delivery.status, delivery.error, delivery.answer = args.status, args.error, args.answer
if args.state == 'delivered' then
  redis.call('DEL', agenda.failing .. queue)
elseif args.attempts > 0 then
  redis.call('SET', agenda.failing .. queue, string.format('%d', now + agenda.failing_for), 'PX', agenda.failing_for)
end
if args.state == 'pending' then
  enqueue_delivery(agenda, id, delivery, args.wait, now, wall)
  return {'recorded', now}
end
save_delivery(agenda, id, delivery)
if args.state == 'delivered' then
  redis.call('PEXPIRE', agenda.delivery .. id, args.keep_delivered)
else
  redis.call('ZADD', agenda.failed, wall, id)
  redis.call('ZREMRANGEBYSCORE', agenda.failed, '-inf', wall - agenda.keep)
  redis.call('PEXPIRE', agenda.failed, agenda.keep)
end
schedule_queue(agenda, queue, now)
return {'recorded', now}
