-- Make the queue say what the store says, in one step: nobody claims in between.
-- KEYS[1] todo; KEYS[2] claimed; KEYS[3] owners (see claim.lua)
-- ARGV: first and last of each stretch of chunk indices planned and not committed, ascending
-- Where the queue is right already, a stretch costs one count, however long it is.
local claimed = redis.call('ZRANGE', KEYS[2], 0, -1)
for place, index in ipairs(claimed) do
  claimed[place] = tonumber(index)
end
table.sort(claimed)

-- Add what nobody holds; `held` are the claims from first to last.
local function add(first, last, held)
  local there = redis.call('ZCOUNT', KEYS[1], first, last)
  for _, index in ipairs(held) do
    if not redis.call('ZSCORE', KEYS[1], index) then
      there = there + 1
    end
  end
  if there > last - first then
    return
  end
  if last - first < 64 then
    for index = first, last do
      if not redis.call('ZSCORE', KEYS[2], index) then
        redis.call('ZADD', KEYS[1], 'NX', index, index)
      end
    end
    return
  end
  local middle, lower, upper = math.floor((first + last) / 2), {}, {}
  for _, index in ipairs(held) do
    table.insert(index <= middle and lower or upper, index)
  end
  add(first, middle, lower)
  add(middle + 1, last, upper)
end

-- Forget what lies between two stretches.
local function forget(after, before)
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. after, '(' .. before)
end

local place, after = 1, '-inf'
local function forget_claims(before)
  while claimed[place] and claimed[place] < before do
    redis.call('ZREM', KEYS[2], claimed[place])
    redis.call('HDEL', KEYS[3], claimed[place])
    place = place + 1
  end
end

for number = 1, #ARGV, 2 do
  local first, last, held = tonumber(ARGV[number]), tonumber(ARGV[number + 1]), {}
  forget(after, first)
  forget_claims(first)
  while claimed[place] and claimed[place] <= last do
    table.insert(held, claimed[place])
    place = place + 1
  end
  add(first, last, held)
  after = last
end
forget(after, '+inf')
forget_claims(math.huge)
return 1
