-- Changes the registry, if nobody else did since it was read.
-- KEYS     registry, then the owner (tenant or account) of each policy, then each owner to drop
-- ARGV     MessagePack {version, channel, put, drop, policies, forget}: put {field: value}, drop [field],
--          policies [one per owner], forget: how many owners to drop
-- RETURNS  {'written', version} or {'stale', version}
local ask = cmsgpack.unpack(ARGV[1])
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or 0)
if version ~= ask.version then
  return {'stale', version}
end
for field, value in pairs(ask.put) do
  redis.call('HSET', KEYS[1], field, value)
end
for _, field in ipairs(ask.drop) do
  redis.call('HDEL', KEYS[1], field)
end
for index, policy in ipairs(ask.policies) do
  redis.call('HSET', KEYS[1 + index], 'policy', policy)
  redis.call('PERSIST', KEYS[1 + index])
end
for index = 1, ask.forget do
  redis.call('DEL', KEYS[1 + #ask.policies + index])
end
redis.call('HSET', KEYS[1], 'version', version + 1)
redis.call('PUBLISH', ask.channel, version + 1)
return {'written', version + 1}
