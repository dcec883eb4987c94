-- Makes sure that a machine holds an element of a list that it works on. One that others have put back (the machine was
-- cut off for a while) is taken out of the list again.
-- KEYS: 1 the machine's list, 2 the list it was taken from
-- ARGV: 1 the element
-- Returns: 1 when it is held, 0 when another machine has it or nobody
if redis.call('LPOS', KEYS[1], ARGV[1]) then
  return 1
end
if redis.call('LREM', KEYS[2], 1, ARGV[1]) == 0 then
  return 0
end
redis.call('RPUSH', KEYS[1], ARGV[1])
return 1
