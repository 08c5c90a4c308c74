-- Prolong a claim that is still ours. Returns 1 if it is.
-- KEYS[1] claimed  sorted set; KEYS[2] owners  hash (see claim.lua)
-- ARGV: worker, lease in ms, chunk index
if redis.call('HGET', KEYS[2], ARGV[3]) ~= ARGV[1] then
  return 0
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], 'XX', now + ARGV[2], ARGV[3])
return 1
