-- Moves the newest element that a dead machine had taken back to the head of its list, if the machine is still dead.
-- Called until it returns 0, the list is as it was.
-- KEYS: 1 the machine's list, 2 the list it was taken from, 3 the machine's sign of life (left out on a cluster)
-- Returns: 1 when one was moved, else 0
if KEYS[3] and redis.call('EXISTS', KEYS[3]) == 1 then
  return 0
end
if redis.call('LMOVE', KEYS[1], KEYS[2], 'RIGHT', 'LEFT') then
  return 1
end
return 0
