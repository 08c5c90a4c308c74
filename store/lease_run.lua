-- Lease the pending run that is least far on and that nobody holds.
-- KEYS[1] pending  sorted set  run id, scored by position
-- ARGV: worker, lease in ms, prefix of lease keys (string  run lease -> worker), then runs to leave out
local left_out = {}
for i = 4, #ARGV do
  left_out[ARGV[i]] = true
end
for _, run in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  if not left_out[run] and redis.call('SET', ARGV[3] .. run, ARGV[1], 'NX', 'PX', ARGV[2]) then
    return run
  end
end
return false
