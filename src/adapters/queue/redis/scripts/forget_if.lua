-- Deletes a hash if its fields have these values.
-- KEYS: 1 the hash
-- ARGV: fields and values
-- Returns: 1 when deleted, else 0
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) ~= ARGV[i + 1] then
    return 0
  end
end
return redis.call('DEL', KEYS[1])
