-- Notes the metrics of an epoch, in place of what was noted for it before.
-- KEYS: 1 the metrics of a task, 2 its fencing number (left out on a cluster)
-- ARGV: 1 epoch, 2 member, 3 lifetime in milliseconds, 4 instance of the task, 5 fence
-- Returns: {`published` or `fenced`; owner; fence of the owner}
if KEYS[2] then
  local other = redis.call('HMGET', KEYS[2], 'owner', 'fence', 'instance')
  if (tonumber(other[2] or '') or 0) > tonumber(ARGV[5]) and other[3] == ARGV[4] then
    return { 'fenced', other[1] or '', other[2] }
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], ARGV[1], ARGV[1])
redis.call('ZADD', KEYS[1], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return { 'published', '', '0' }
