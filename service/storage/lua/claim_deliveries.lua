-- Takes the deliveries that are due, of all receivers in turn; nobody else gets them until the lease runs out.
-- USES: store, deliveries
-- KEYS     clock, receivers
-- ARGV     MessagePack {most, lease, agenda}
-- RETURNS  {now, {id, the delivery}...}
local ask = cmsgpack.unpack(ARGV[1])
local now = clock(KEYS[1])
local agenda, taken = ask.agenda, {now}
for _, receiver in ipairs(redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, ask.most)) do
  local queue, claims = agenda.queue .. receiver, agenda.claims .. receiver
  for _, id in ipairs(redis.call('ZRANGE', claims, '-inf', now, 'BYSCORE')) do
    redis.call('ZREM', claims, id)
    redis.call('ZADD', queue, now, id)
  end
  local room = math.min(at_once(agenda, receiver, now) - redis.call('ZCARD', claims), ask.most - #taken + 1)
  for _, id in ipairs(redis.call('ZRANGE', queue, '-inf', now, 'BYSCORE', 'LIMIT', 0, math.max(room, 0))) do
    redis.call('ZREM', queue, id)
    local delivery = redis.call('GET', agenda.delivery .. id)
    if delivery then
      redis.call('ZADD', claims, now + ask.lease, id)
      taken[#taken + 1] = {id, delivery}
    end
  end
  take_turn(agenda, receiver, now)
end
return taken
