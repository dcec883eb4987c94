-- Notes the metrics of an epoch, in place of what was noted for it before. The history is that of the task's last run:
-- with its first note goes what an earlier run left from that epoch on (a resumed run begins behind the first), and what
-- an earlier run tells of those epochs later is left out.
-- KEYS: 1 the metrics of a task, 2 the run that they are of, 3 the fencing number of the task (left out on a cluster)
-- ARGV: 1 epoch, 2 member, 3 lifetime in milliseconds, 4 instance of the task, 5 fence, 6 machine
-- Returns: {`published`, `duplicate` (left out) or `fenced`; owner; fence of the owner}
local epoch, instance, fence, machine = ARGV[1], ARGV[4], ARGV[5], ARGV[6]
if KEYS[3] then
  local other = redis.call('HMGET', KEYS[3], 'owner', 'fence', 'instance')
  if (tonumber(other[2] or '') or 0) > tonumber(fence) and other[3] == instance then
    return { 'fenced', other[1] or '', other[2] }
  end
end
local noted = redis.call('HMGET', KEYS[2], 'owner', 'fence', 'instance', 'first_epoch')
if is_later(noted, machine, fence, instance) then
  if noted[3] == instance then
    return { 'fenced', noted[1] or '', noted[2] }
  end
  if tonumber(epoch) >= (tonumber(noted[4] or '') or 0) then
    return { 'duplicate', '', '0' }
  end
else
  if noted[3] ~= instance then
    if noted[3] then
      redis.call('ZREMRANGEBYSCORE', KEYS[1], epoch, '+inf')
    end
    redis.call('HSET', KEYS[2], 'first_epoch', epoch)
  end
  redis.call('HSET', KEYS[2], 'owner', machine, 'fence', fence, 'instance', instance)
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], epoch, epoch)
redis.call('ZADD', KEYS[1], epoch, ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return { 'published', '', '0' }
