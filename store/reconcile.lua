-- Make the queue say what the store says, in one step: nobody claims in between.
-- KEYS[1] todo; KEYS[2] claimed; KEYS[3] owners (see claim.lua)
-- ARGV: every chunk index that is planned and not committed
local missing = {}
for _, index in ipairs(ARGV) do
  missing[index] = true
  if not redis.call('ZSCORE', KEYS[2], index) then
    redis.call('ZADD', KEYS[1], 'NX', index, index)
  end
end
for _, index in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  if not missing[index] then
    redis.call('ZREM', KEYS[1], index)
  end
end
for _, index in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  if not missing[index] then
    redis.call('ZREM', KEYS[2], index)
    redis.call('HDEL', KEYS[3], index)
  end
end
return 1
