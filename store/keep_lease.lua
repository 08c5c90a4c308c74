-- Prolong (ARGV[2] > 0, in ms) or give up (ARGV[2] = 0) a run lease, if nobody else holds it. One that is
-- gone, because Redis lost it or it ended unnoticed, is taken again.
-- KEYS[1] lease  string -> worker
-- ARGV: worker, lease in ms
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
if tonumber(ARGV[2]) > 0 then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
  return 1
end
return redis.call('DEL', KEYS[1])
