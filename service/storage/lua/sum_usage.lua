-- Sums the usage of a tenant over some days.
-- KEYS     tenant
-- ARGV     MessagePack {usage_prefix, first, last}: the prefix of the keys of the tenant's days, which share the hash tag of
--          KEYS, and the days, counted from the epoch
-- RETURNS  {{field, sum...}, {day, field, value}...}: the sums, then the submissions that a day lists
local args = cmsgpack.unpack(ARGV[1])
local sums, answer = {}, {{}}
for day = args.first, args.last do
  local fields = redis.call('HGETALL', string.format('%s%d', args.usage_prefix, day))
  for index = 1, #fields, 2 do
    local field, number = fields[index], tonumber(fields[index + 1])
    if number then
      sums[field] = (sums[field] or 0) + number
    else
      answer[#answer + 1] = {day, field, fields[index + 1]}
    end
  end
end
for field, sum in pairs(sums) do
  table.insert(answer[1], field)
  table.insert(answer[1], sum)
end
return answer
