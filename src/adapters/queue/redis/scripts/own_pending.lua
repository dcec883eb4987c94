-- What a consumer of a stream has not acknowledged. It counts as a sign of life, and as a further delivery where that is
-- asked for. Entries that were deleted from the stream are acknowledged.
-- KEYS: 1 the stream
-- ARGV: 1 group, 2 consumer, 3 id after which to begin, 4 entries at most, 5 `count` to count a delivery
-- Returns: {id to go on after, or '' at the end; list of {id, {field, value, ..}, deliveries}}
local group, consumer = ARGV[1], ARGV[2]
local rows = redis.call('XPENDING', KEYS[1], group, '(' .. ARGV[3], '+', ARGV[4], consumer)
local found = {}
local go_on = ''
for _, row in ipairs(rows) do
  local id, deliveries = row[1], row[4]
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    if ARGV[5] == 'count' then
      deliveries = deliveries + 1
    end
    redis.call('XCLAIM', KEYS[1], group, consumer, 0, id, 'RETRYCOUNT', deliveries, 'JUSTID')
    found[#found + 1] = { id, entry[2], deliveries }
  else
    redis.call('XACK', KEYS[1], group, id)
  end
  go_on = id
end
if #rows < tonumber(ARGV[4]) then
  go_on = ''
end
return { go_on, found }
