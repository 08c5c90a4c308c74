-- Prolong (ARGV[2] > 0, in ms) or give up (ARGV[2] = 0) a run lease that is still ours.
-- KEYS[1] lease  string -> worker
-- ARGV: worker, lease in ms
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
if tonumber(ARGV[2]) > 0 then
  return redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return redis.call('DEL', KEYS[1])
