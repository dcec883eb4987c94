-- Appends lines to the log stream of a task, if they begin where this machine's last ones ended.
-- KEYS: 1 the stream, 2 hash of machine to offset
-- ARGV: 1 machine, 2 offset at which the lines begin, 3 at which they end, 4 lines kept, 5.. lines
-- Returns: {1, new offset} or {0, offset to continue at}
local at = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '') or 0
if at ~= tonumber(ARGV[2]) then
  return { 0, at }
end
for i = 5, #ARGV do
  redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[4], '*', 'value', ARGV[i])
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[3])
redis.call('PERSIST', KEYS[1])
redis.call('PERSIST', KEYS[2])
return { 1, tonumber(ARGV[3]) }
