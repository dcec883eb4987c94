-- Takes a GPU, or goes on having it.
-- KEYS: 1 the GPU
-- ARGV: 1 machine, 2 incarnation, 3 lifetime in milliseconds
-- Returns: the machine that has it
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= ARGV[1] then
  return owner
end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'incarnation', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return ARGV[1]
