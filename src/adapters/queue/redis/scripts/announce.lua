-- A machine's sign of life, if no other service uses its name.
-- KEYS: 1 the machine
-- ARGV: 1 incarnation, 2 lifetime in milliseconds, 3 now by the machine's clock, 4.. fields and values
-- Returns: {1, incarnation, '', '', now by the server's clock} or {0, other incarnation, its host, since when it is there, now}
local other = redis.call('HMGET', KEYS[1], 'incarnation', 'host', 'since')
local now = digits(now_ms())
if other[1] and other[1] ~= ARGV[1] then
  return { 0, other[1], other[2] or '', other[3] or '', now }
end
local fields = {}
for i = 4, #ARGV do
  fields[#fields + 1] = ARGV[i]
end
redis.call('HSET', KEYS[1], 'incarnation', ARGV[1], 'since', other[3] or ARGV[3], unpack(fields))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return { 1, ARGV[1], '', '', now }
