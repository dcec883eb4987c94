-- Prolongs a lease, unless a higher fencing number was given out. A lease that is gone (it ran out, or the server was
-- emptied) is taken again with the same number.
-- KEYS: 1 the lease, 2 the fencing number
-- ARGV: 1 machine, 2 incarnation, 3 instance of the task, 4 lifetime of the lease, 5 of the number, in milliseconds,
--       6 fence, 7 attempts
-- Returns: {1, machine, fence} or {0, owner, fence of the owner}
local mine = tonumber(ARGV[6])
local held = redis.call('HMGET', KEYS[1], 'owner', 'fence')
local last = redis.call('HMGET', KEYS[2], 'owner', 'fence')
for _, other in ipairs({ held, last }) do
  local fence = tonumber(other[2] or '') or 0
  if fence > mine or (fence == mine and other[1] and other[1] ~= ARGV[1]) then
    return { 0, other[1] or '', other[2] }
  end
end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'incarnation', ARGV[2], 'instance', ARGV[3], 'fence', ARGV[6],
  'attempts', ARGV[7])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('HSET', KEYS[2], 'fence', ARGV[6], 'owner', ARGV[1], 'instance', ARGV[3], 'attempts', ARGV[7])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return { 1, ARGV[1], ARGV[6] }
