-- Acknowledges an entry, and removes it unless other groups read the stream too.
-- KEYS: 1 the stream
-- ARGV: 1 group, 2 id
-- Returns: 1 when it was pending, else 0
return acknowledge(KEYS[1], ARGV[1], ARGV[2])
