-- A sign of life for entries that a consumer still holds: their idle time begins anew, nothing else changes.
-- KEYS: 1 the stream
-- ARGV: 1 group, 2 consumer, 3.. ids
-- Returns: the ids that are not held by this consumer (any more)
local group, consumer = ARGV[1], ARGV[2]
local lost = {}
for i = 3, #ARGV do
  local id = ARGV[i]
  if holder_of(KEYS[1], group, id) ~= consumer
      or #redis.call('XCLAIM', KEYS[1], group, consumer, 0, id, 'JUSTID') == 0 then
    lost[#lost + 1] = id
  end
end
return lost
