-- Moves one element from a list to the end of another, if it is there.
-- KEYS: 1 from, 2 to
-- ARGV: 1 the element
-- Returns: 1 when moved, else 0
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then
  return 0
end
redis.call('RPUSH', KEYS[2], ARGV[1])
return 1
