-- Sends new entries to the stream of their class, then takes the most urgent ones.
-- An entry of the topic with a field `priority` of `high` or `low` moves to that class's stream, with its id where that
-- is possible, and with the field `entry_id`. What was looked at once is not looked at again. With other groups on the
-- topic nothing moves: it would be taken from them.
-- KEYS: 1 high, 2 the topic, 3 low, 4 where the looking stopped
-- ARGV: 1 group, 2 consumer, 3 entries wanted, 4 milliseconds of waiting that are worth a class (0: none ever),
--       5 entries to look at
-- Returns: a list of {queue, id, {field, value, ..}}; NOGROUP when a stream lacks the group
local group, consumer = ARGV[1], ARGV[2]
local wanted, ageing, look_at = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local FIELDS_MAX = 500

local last = {}
local groups_of_topic = 0
for class = 1, 3 do
  local id, groups = group_of(KEYS[class], group)
  if class == 2 then
    groups_of_topic = groups
  end
  if id then
    last[class] = id
  elseif class ~= 2 or redis.call('EXISTS', KEYS[2]) == 1 then
    return redis.error_reply('NOGROUP No such consumer group on ' .. KEYS[class])
  end
end

if last[2] then
  -- A producer that gives a lifetime means its message, and would lose all of them.
  redis.call('PERSIST', KEYS[2])
end

if last[2] and groups_of_topic == 1 then
  local from = redis.call('GET', KEYS[4])
  if not from or is_after(last[2], from) then
    from = last[2]
  end
  local rows = redis.call('XRANGE', KEYS[2], '(' .. from, '+', 'COUNT', look_at)
  for _, row in ipairs(rows) do
    local id, fields = row[1], row[2]
    local class = nil
    for i = 1, #fields, 2 do
      if fields[i] == 'priority' then
        local word = string.lower(fields[i + 1])
        class = (word == 'high' and 1) or (word == 'low' and 3) or nil
      end
    end
    if class and #fields <= FIELDS_MAX then
      fields[#fields + 1] = 'entry_id'
      fields[#fields + 1] = id
      local added = redis.pcall('XADD', KEYS[class], id, unpack(fields))
      if type(added) == 'table' and added.err then
        redis.call('XADD', KEYS[class], '*', unpack(fields))
      end
      redis.call('XDEL', KEYS[2], id)
    end
    from = id
  end
  if #rows > 0 then
    redis.call('SET', KEYS[4], from)
  end
end

local now = now_ms()
local heads = {}
local function look(class)
  heads[class] = nil
  if last[class] then
    local row = redis.call('XRANGE', KEYS[class], '(' .. last[class], '+', 'COUNT', 1)[1]
    if row then
      local at = id_parts(row[1])
      for i = 1, #row[2], 2 do
        -- In the stream of a class the field is ours.
        if class ~= 2 and row[2][i] == 'entry_id' and id_parts(row[2][i + 1]) > 0 then
          at = id_parts(row[2][i + 1])
        end
      end
      local rank = 3 - class
      if ageing > 0 then
        rank = rank + math.max(now - at, 0) / ageing
      end
      heads[class] = { rank = rank, at = at }
    end
  end
end
for class = 1, 3 do
  look(class)
end

local taken = {}
while #taken < wanted do
  local best = nil
  for class = 1, 3 do
    local head = heads[class]
    if head and (not best or head.rank > heads[best].rank
        or (head.rank == heads[best].rank and head.at < heads[best].at)) then
      best = class
    end
  end
  if not best then
    break
  end
  local reply = redis.call('XREADGROUP', 'GROUP', group, consumer, 'COUNT', 1, 'STREAMS', KEYS[best], '>')
  if not reply then
    break
  end
  local row = reply[1][2][1]
  last[best] = row[1]
  taken[#taken + 1] = { KEYS[best], row[1], row[2] }
  look(best)
end
return taken
