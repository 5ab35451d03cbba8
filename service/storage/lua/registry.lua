-- Changes the registry, if nobody else did since it was read.
-- KEYS     registry, then the owner (tenant or account) of each policy, then each owner to forget, whose counters stay
--          for as long as its last tasks may need them
-- ARGV     MessagePack {version, later_than, channel, drop, puts, policies, forget}: drop lists fields, the last three
--          say how many there are of each; then field and value of each put, then each policy
-- RETURNS  {'written', version} or {'stale', version}
local ask = cmsgpack.unpack(ARGV[1])
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or 0)
if version ~= ask.version then
  return {'stale', version}
end
for index = 2, 2 * ask.puts, 2 do
  redis.call('HSET', KEYS[1], ARGV[index], ARGV[index + 1])
end
for _, field in ipairs(ask.drop) do
  redis.call('HDEL', KEYS[1], field)
end
for index = 1, ask.policies do
  redis.call('HSET', KEYS[1 + index], 'policy', ARGV[1 + 2 * ask.puts + index])
  redis.call('PERSIST', KEYS[1 + index])
end
for index = 1, ask.forget do
  local key = KEYS[1 + ask.policies + index]
  redis.call('HDEL', key, 'policy')
  redis.call('PEXPIRE', key, KEEP_DELETED_MS)
end
version = math.max(version, ask.later_than) + 1
redis.call('HSET', KEYS[1], 'version', version)
redis.call('PUBLISH', ask.channel, version)
return {'written', version}
