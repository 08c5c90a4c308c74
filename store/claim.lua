-- Claim the lowest chunk index that may be made; expired claims return first.
-- KEYS[1] todo     sorted set  chunk index, scored by itself
-- KEYS[2] claimed  sorted set  chunk index, scored by when its lease ends (server time, ms)
-- KEYS[3] owners   hash        chunk index -> worker
-- ARGV: worker, lease in ms, first index that may not be claimed yet
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for _, index in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do
  redis.call('ZREM', KEYS[2], index)
  redis.call('HDEL', KEYS[3], index)
  redis.call('ZADD', KEYS[1], index, index)
end
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. ARGV[3], 'LIMIT', 0, 1)
if #found == 0 then
  return false
end
redis.call('ZREM', KEYS[1], found[1])
redis.call('ZADD', KEYS[2], now + ARGV[2], found[1])
redis.call('HSET', KEYS[3], found[1], ARGV[1])
return found[1]
