-- Ends claims of checks that were not made: they are due at once.
-- USES: store
-- KEYS     clock, poll:due, poll:claimed
-- ARGV     MessagePack {reservations}
-- RETURNS  {}
local now = advance_clock(KEYS[1])
for _, id in ipairs(cmsgpack.unpack(ARGV[1]).reservations) do
  if redis.call('ZREM', KEYS[3], id) == 1 then
    redis.call('ZADD', KEYS[2], now, id)
  end
end
return {}
