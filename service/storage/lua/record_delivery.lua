-- Writes what became of an attempt to deliver. What was delivered stays so, whoever else has claimed it meanwhile.
-- USES: store, deliveries
-- KEYS     clock, receivers
-- ARGV     MessagePack {id, leased, state, attempts, wait, status, error, answer, keep_delivered, agenda}: leased is
--          when the lease of the claim ends, attempts how many were made, wait after how long it is tried again
-- RETURNS  {'recorded', now}, {'final', now} if it had its outcome, or {'lapsed', now} if another claim has begun
local ask = cmsgpack.unpack(ARGV[1])
local now, wall = clock(KEYS[1])
local agenda, id = ask.agenda, ask.id
local delivery = unpacked(redis.call('GET', agenda.delivery .. id))
if not delivery or delivery.state ~= 'pending' then
  return {'final', now}
end
local receiver = receiver_of(delivery)
local claims = agenda.claims .. receiver
local leased = tonumber(redis.call('ZSCORE', claims, id) or 0)
if ask.state ~= 'delivered' and leased ~= ask.leased then
  return {'lapsed', now}
end
redis.call('ZREM', claims, id)
redis.call('ZREM', agenda.queue .. receiver, id)
delivery.state, delivery.updated, delivery.due = ask.state, wall, nil
delivery.attempts = delivery.attempts + ask.attempts
delivery.status, delivery.error, delivery.answer = ask.status, ask.error, ask.answer
if ask.state == 'delivered' then
  redis.call('DEL', agenda.failing .. receiver)
elseif ask.attempts > 0 then
  redis.call('SET', agenda.failing .. receiver, string.format('%d', now + agenda.failing_for), 'PX', agenda.failing_for)
end
if ask.state == 'pending' then
  enqueue(agenda, id, delivery, ask.wait, now, wall)
  return {'recorded', now}
end
save_delivery(agenda, id, delivery)
if ask.state == 'delivered' then
  redis.call('PEXPIRE', agenda.delivery .. id, ask.keep_delivered)
else
  redis.call('ZADD', agenda.failed, wall, id)
  redis.call('ZREMRANGEBYSCORE', agenda.failed, '-inf', wall - agenda.keep)
  redis.call('PEXPIRE', agenda.failed, agenda.keep)
end
take_turn(agenda, receiver, now)
return {'recorded', now}
