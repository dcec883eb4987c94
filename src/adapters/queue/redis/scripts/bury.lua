-- Moves an entry to the stream of the dead, if this consumer still holds it.
-- KEYS: 1 the stream, or the machine's list of taken elements; 2 the stream of the dead
-- ARGV: 1 `stream` or `list`, 2 group, 3 consumer, 4 id or element, 5 entries kept, 6.. fields and values
-- Returns: 1 when buried, 0 when it was not held
if ARGV[1] == 'list' then
  if redis.call('LREM', KEYS[1], 1, ARGV[4]) == 0 then
    return 0
  end
elseif holder_of(KEYS[1], ARGV[2], ARGV[4]) ~= ARGV[3] then
  return 0
end
local fields = {}
for i = 6, #ARGV do
  fields[#fields + 1] = ARGV[i]
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', unpack(fields))
if ARGV[1] ~= 'list' then
  acknowledge(KEYS[1], ARGV[2], ARGV[4])
end
return 1
