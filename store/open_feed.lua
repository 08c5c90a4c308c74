-- Make an empty stream whose last id is that of the position before the first one to feed.
-- KEYS[1] feed  stream  id <position + 1>-0, field "chunk"
-- ARGV: position of the head that the feed starts from
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
redis.call('XGROUP', 'CREATE', KEYS[1], 'make', '0', 'MKSTREAM')
redis.call('XGROUP', 'DESTROY', KEYS[1], 'make')
if tonumber(ARGV[1]) > 0 then
  redis.call('XSETID', KEYS[1], ARGV[1] .. '-0')
end
return 1
