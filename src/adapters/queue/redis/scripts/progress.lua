-- Shows the progress of a job, unless a later owner or a later run of it is known, or this run is shown to have ended.
-- KEYS: 1 the hash, 2 the fencing number of the task (left out on a cluster)
-- ARGV: 1 machine, 2 fence, 3 instance of the task, 4 `whole` when all fields are given and others go, `part`, or `again`:
--       as `whole`, unless this run is shown to have ended,
--       5 lifetime in milliseconds (0: none, the job goes on), 6.. fields and values
-- Returns: 1 when shown, else 0
local machine, fence, instance = ARGV[1], ARGV[2], ARGV[3]
local shown = redis.call('HMGET', KEYS[1], 'MACHINE_ID', 'fence', 'instance', 'status')
if is_later(shown, machine, fence, instance) then
  return 0
end
if KEYS[2] and is_later(redis.call('HMGET', KEYS[2], 'owner', 'fence', 'instance'), machine, fence, instance) then
  return 0
end
local is_over = shown[4] == 'completed' or shown[4] == 'failed' or shown[4] == 'cancelled'
if (ARGV[5] == '0' or ARGV[4] == 'again') and is_over and shown[3] == instance and (tonumber(shown[2] or '') or 0) >= tonumber(fence) then
  -- It was on its way when the job ended, or is nothing new.
  return 0
end
if ARGV[4] ~= 'part' or shown[3] ~= instance then
  redis.call('DEL', KEYS[1])
end
local fields = {}
for i = 6, #ARGV do
  fields[#fields + 1] = ARGV[i]
end
redis.call('HSET', KEYS[1], 'MACHINE_ID', machine, 'fence', fence, 'instance', instance, unpack(fields))
if ARGV[5] == '0' then
  redis.call('PERSIST', KEYS[1])
else
  redis.call('PEXPIRE', KEYS[1], ARGV[5])
end
return 1
