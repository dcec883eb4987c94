-- Moves one element from a list to another, if it is there.
-- KEYS: 1 from, 2 to
-- ARGV: 1 the element, 2 LEFT or RIGHT: the end of the second list
-- Returns: 1 when moved, else 0
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then
  return 0
end
if ARGV[2] == 'LEFT' then
  redis.call('LPUSH', KEYS[2], ARGV[1])
else
  redis.call('RPUSH', KEYS[2], ARGV[1])
end
return 1
