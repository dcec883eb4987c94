-- Begins the lifetime of a log, unless a later owner or a later run of the task is known.
-- KEYS: 1 the stream, 2 hash of machine to offset, 3 the fencing number of the task (left out on a cluster)
-- ARGV: 1 machine, 2 fence, 3 instance of the task, 4 lifetime in milliseconds
-- Returns: 1 when it ends, else 0
if KEYS[3] and is_later(redis.call('HMGET', KEYS[3], 'owner', 'fence', 'instance'), ARGV[1], ARGV[2], ARGV[3]) then
  return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
