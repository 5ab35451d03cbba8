-- Ends a script before it touches data of another version, and marks a store that lost its mark with all the rest.
--
-- The last of KEYS holds the version of the data, the last of ARGV is the one of these scripts.
local data_version = redis.call('GET', KEYS[#KEYS])
if data_version ~= ARGV[#ARGV] then
  if data_version then
    return redis.error_reply('DATAVERSION ' .. data_version)
  end
  redis.call('SET', KEYS[#KEYS], ARGV[#ARGV])
end
