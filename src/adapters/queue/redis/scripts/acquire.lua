-- Takes the lease of a task when it is free or held by the same machine (which has restarted).
-- The fencing number grows with every taking. It is at least the server's clock in milliseconds, so that it also grows
-- beyond what was given out before the server was emptied.
-- KEYS: 1 the lease, 2 the fencing number
-- ARGV: 1 machine, 2 incarnation, 3 instance of the task, 4 lifetime of the lease, 5 of the number, in milliseconds
-- Returns: {1, machine, fence, attempts before} or {0, owner, fence of the owner, '0'}
local held = redis.call('HMGET', KEYS[1], 'owner', 'fence')
if held[1] and held[1] ~= ARGV[1] then
  return { 0, held[1], held[2] or '0', '0' }
end
local last = redis.call('HMGET', KEYS[2], 'fence', 'instance', 'attempts')
local fence = digits(math.max((tonumber(last[1] or '') or 0) + 1, (tonumber(held[2] or '') or 0) + 1, now_ms()))
local attempts = '0'
if last[2] == ARGV[3] then
  attempts = last[3] or '0'
end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'incarnation', ARGV[2], 'instance', ARGV[3], 'fence', fence,
  'attempts', attempts)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('HSET', KEYS[2], 'fence', fence, 'owner', ARGV[1], 'instance', ARGV[3], 'attempts', attempts)
redis.call('PEXPIRE', KEYS[2], ARGV[5])
return { 1, ARGV[1], fence, attempts }
