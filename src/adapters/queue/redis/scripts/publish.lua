-- Publishes a result once, acknowledges the entry that the task came from, and lets the lease go.
-- On a cluster the first two keys are given alone, and the rest is done before and after.
-- KEYS: 1 mark of what was published, 2 stream of results, 3 fencing number, 4 lease,
--       5 the stream that the entry is in, or the machine's list of taken elements (when there is an entry)
-- ARGV: 1 instance of the task, 2 fence, 3 lifetime of the mark in milliseconds, 4 results kept, 5 group,
--       6 `stream` or `list`, 7 id or element, 8.. fields and values
-- Returns: {`published`, `duplicate` or `fenced`; owner; fence of the owner}
local mine = tonumber(ARGV[2])
for i = 3, 4 do
  if KEYS[i] then
    local other = redis.call('HMGET', KEYS[i], 'owner', 'fence', 'instance')
    if (tonumber(other[2] or '') or 0) > mine and other[3] == ARGV[1] then
      return { 'fenced', other[1] or '', other[2] }
    end
  end
end
local outcome = 'duplicate'
if redis.call('EXISTS', KEYS[1]) == 0 then
  local fields = {}
  for i = 8, #ARGV do
    fields[#fields + 1] = ARGV[i]
  end
  local id = redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', unpack(fields))
  redis.call('SET', KEYS[1], id, 'PX', ARGV[3])
  outcome = 'published'
end
if KEYS[5] then
  -- What became of the queue since then must not undo the publication.
  if ARGV[6] == 'list' then
    redis.pcall('LREM', KEYS[5], 1, ARGV[7])
  else
    pcall(acknowledge, KEYS[5], ARGV[5], ARGV[7])
  end
end
if KEYS[4] and redis.call('HGET', KEYS[4], 'fence') == ARGV[2] then
  redis.call('DEL', KEYS[4])
end
return { outcome, '', '0' }
