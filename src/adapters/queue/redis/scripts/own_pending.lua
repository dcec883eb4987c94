-- What a consumer of a stream has not acknowledged. Entries that were deleted from the stream are acknowledged.
-- KEYS: 1 the stream
-- ARGV: 1 group, 2 consumer, 3 id after which to begin, 4 entries at most
-- Returns: {id to go on after, or '' at the end; list of {id, {field, value, ..}, deliveries}}
local group, consumer = ARGV[1], ARGV[2]
local reply = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', ARGV[4], 'STREAMS', KEYS[1], ARGV[3])
local rows = (reply and reply[1] and reply[1][2]) or {}
local found = {}
for _, row in ipairs(rows) do
  if row[2] then
    local _, deliveries = holder_of(KEYS[1], group, row[1])
    found[#found + 1] = { row[1], row[2], deliveries }
  else
    redis.call('XACK', KEYS[1], group, row[1])
  end
end
local go_on = ''
if #rows >= tonumber(ARGV[4]) then
  go_on = rows[#rows][1]
end
return { go_on, found }
