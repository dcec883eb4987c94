-- Gives an entry to another consumer, if the giver still holds it.
-- KEYS: 1 the stream
-- ARGV: 1 group, 2 giver, 3 receiver, 4 id, 5 milliseconds that it is to have been idle
-- Returns: 1 when given, 0 when the giver did not hold it
if holder_of(KEYS[1], ARGV[1], ARGV[4]) ~= ARGV[2] then
  return 0
end
-- Whoever takes it next has not failed at it yet.
return #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[4], 'IDLE', ARGV[5], 'RETRYCOUNT', 0, 'JUSTID')
