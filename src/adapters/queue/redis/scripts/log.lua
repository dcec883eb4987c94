-- Appends lines to the log stream of a task, if they begin where this machine's last ones ended and no later owner or
-- later run of the task is known.
-- KEYS: 1 the stream, 2 hash of machine to offset, 3 the fencing number of the task (left out on a cluster)
-- ARGV: 1 machine, 2 fence, 3 instance of the task, 4 offset at which the lines begin, 5 at which they end, 6 at which
--       the log of this run begins, 7 lines kept, 8 lifetime in milliseconds (0: none, the job goes on), 9.. lines
-- Returns: {1, new offset}, {0, offset to continue at} or {2, 0} when fenced
local machine = ARGV[1]
if KEYS[3] and is_later(redis.call('HMGET', KEYS[3], 'owner', 'fence', 'instance'), machine, ARGV[2], ARGV[3]) then
  return { 2, 0 }
end
local at = tonumber(redis.call('HGET', KEYS[2], machine) or '') or tonumber(ARGV[6])
if at ~= tonumber(ARGV[4]) then
  return { 0, at }
end
for i = 9, #ARGV do
  redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[7], '*', 'value', ARGV[i])
end
redis.call('HSET', KEYS[2], machine, ARGV[5])
for i = 1, 2 do
  if ARGV[8] == '0' then
    redis.call('PERSIST', KEYS[i])
  else
    redis.call('PEXPIRE', KEYS[i], ARGV[8])
  end
end
return { 1, tonumber(ARGV[5]) }
