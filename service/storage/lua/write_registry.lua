-- Writes a change of the registry, if the registry is still the version that the change was made from.
-- KEYS     registry, then the owner (tenant or account) of each policy, then each deleted owner, whose state stays for as
--          long as its last tasks may need it
-- ARGV     MessagePack {version, new_data_version or nil, newer_than, channel, deleted_fields, field_count, policy_count,
--          deleted_count}, then name and value of each field, then each policy
-- RETURNS  {'written', version} or {'stale', version}
local args = cmsgpack.unpack(ARGV[1])
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or 0)
if version ~= args.version then
  return {'stale', version}
end
for index = 2, 2 * args.field_count, 2 do
  redis.call('HSET', KEYS[1], ARGV[index], ARGV[index + 1])
end
for _, field in ipairs(args.deleted_fields) do
  redis.call('HDEL', KEYS[1], field)
end
for index = 1, args.policy_count do
  redis.call('HSET', KEYS[1 + index], 'policy', ARGV[1 + 2 * args.field_count + index])
  redis.call('PERSIST', KEYS[1 + index])
end
for index = 1, args.deleted_count do
  local key = KEYS[1 + args.policy_count + index]
  redis.call('HDEL', key, 'policy')
  redis.call('PEXPIRE', key, KEEP_DELETED_MS)
end
if args.new_data_version then
  redis.call('SET', KEYS[#KEYS], args.new_data_version)  -- the key that the check of the data version has compared
end
version = math.max(version, args.newer_than) + 1
redis.call('HSET', KEYS[1], 'version', version)
redis.call('PUBLISH', args.channel, version)
return {'written', version}
