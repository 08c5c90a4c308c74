-- Give a claim back if it is still ours, so that another worker takes it at once.
-- KEYS[1] todo; KEYS[2] claimed; KEYS[3] owners (see claim.lua)
-- ARGV: worker, chunk index
if redis.call('HGET', KEYS[3], ARGV[2]) ~= ARGV[1] then
  return 0
end
redis.call('HDEL', KEYS[3], ARGV[2])
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[2])
return 1
