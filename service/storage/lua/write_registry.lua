-- Writes a change of the registry, if the registry is still the version that the change was made from.
-- KEYS     registry, then the owner (tenant or account) of each policy, then each deleted owner, whose state stays for as
--          long as its last tasks may need it
-- ARGV     MessagePack {version, later_than, channel, drop, puts, policies, forget}: drop lists fields, the last three say
--          how many there are of each; then field and value of each put, then each policy
-- RETURNS  {'written', version} or {'stale', version}
local args = cmsgpack.unpack(ARGV[1])
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or 0)
if version ~= args.version then
  return {'stale', version}
end
for index = 2, 2 * args.puts, 2 do
  redis.call('HSET', KEYS[1], ARGV[index], ARGV[index + 1])
end
for _, field in ipairs(args.drop) do
  redis.call('HDEL', KEYS[1], field)
end
for index = 1, args.policies do
  redis.call('HSET', KEYS[1 + index], 'policy', ARGV[1 + 2 * args.puts + index])
  redis.call('PERSIST', KEYS[1 + index])
end
for index = 1, args.forget do
  local key = KEYS[1 + args.policies + index]
  redis.call('HDEL', key, 'policy')
  redis.call('PEXPIRE', key, KEEP_DELETED_MS)
end
version = math.max(version, args.later_than) + 1
redis.call('HSET', KEYS[1], 'version', version)
redis.call('PUBLISH', args.channel, version)
return {'written', version}
