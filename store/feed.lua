-- Add one position to a feed, only directly after its predecessor: a gap in a stream is for ever.
-- KEYS[1] feed  stream (see open_feed.lua)
-- ARGV: position, chunk index
-- Returns 1 if added, 0 if the stream's last id is not the predecessor's, -1 if there is no stream.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return -1
end
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' and info[i + 1] ~= ARGV[1] .. '-0' then
    return 0
  end
end
redis.call('XADD', KEYS[1], 'NOMKSTREAM', (ARGV[1] + 1) .. '-0', 'chunk', ARGV[2])
return 1
