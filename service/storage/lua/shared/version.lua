-- Ends a script before it touches data of another version, and marks a store that is empty, or has lost all its data.
--
-- The last of KEYS holds the version of the data, the one before it the registry; the last of ARGV is the version of these
-- scripts. Data without a mark, as the first gateways wrote it, is of version 1.
local data_version = redis.call('GET', KEYS[#KEYS])
if not data_version and redis.call('EXISTS', KEYS[#KEYS - 1]) == 1 then
  data_version = '1'
end
if data_version ~= ARGV[#ARGV] then
  if data_version then
    return redis.error_reply('DATAVERSION ' .. data_version)
  end
  redis.call('SET', KEYS[#KEYS], ARGV[#ARGV])
end
