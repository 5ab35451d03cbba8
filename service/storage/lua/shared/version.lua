-- Ends a script before it touches data of another version, and marks a store that is empty, or has lost all its data.
--
-- The last of KEYS holds the version of the data, the last of ARGV is the version of these scripts.
local data_version = redis.call('GET', KEYS[#KEYS])
if data_version ~= ARGV[#ARGV] then
  if data_version then
    return redis.error_reply('DATAVERSION ' .. data_version)
  end
  redis.call('SET', KEYS[#KEYS], ARGV[#ARGV])
end
