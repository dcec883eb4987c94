-- Claims entries whose consumer shows no sign of life: another one, or the caller itself, which then does not know of
-- them. Entries that were deleted are acknowledged.
-- KEYS: 1 the stream
-- ARGV: 1 group, 2 consumer, 3 milliseconds without a sign of life, 4 entries wanted, 5 id after which to begin
--       ('0-0' at first), 6 entries to look at
-- Returns: {id to go on after, '0-0' when the end was reached; list of {id, {field, value, ..}, deliveries}}
local group, consumer, idle, wanted = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local rows = redis.call('XPENDING', KEYS[1], group, 'IDLE', idle, '(' .. ARGV[5], '+', ARGV[6])
local found = {}
local go_on = '0-0'
local is_cut = #rows >= tonumber(ARGV[6])
for _, row in ipairs(rows) do
  local id = row[1]
  if #found >= wanted then
    is_cut = true
    break
  end
  if #redis.call('XRANGE', KEYS[1], id, id) == 0 then
    redis.call('XACK', KEYS[1], group, id)
  else
    local claimed = redis.call('XCLAIM', KEYS[1], group, consumer, idle, id)
    if claimed[1] and claimed[1][2] then
      local _, deliveries = holder_of(KEYS[1], group, id)
      found[#found + 1] = { id, claimed[1][2], deliveries }
    end
  end
  go_on = id
end
if not is_cut then
  go_on = '0-0'
end
return { go_on, found }
