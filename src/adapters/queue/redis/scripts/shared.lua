-- Functions that the scripts share: this text stands before each of them.

-- Milliseconds of the server's clock.
local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

-- A whole number as digits (Lua would write large ones with an exponent).
local function digits(number)
  return string.format('%.0f', number)
end

-- The two numbers of a stream's id.
local function id_parts(id)
  local ms, sequence = string.match(id, '^(%d+)%-(%d+)$')
  return tonumber(ms) or 0, tonumber(sequence) or 0
end

-- Whether the entry `a` was added after the entry `b`.
local function is_after(a, b)
  local a_ms, a_sequence = id_parts(a)
  local b_ms, b_sequence = id_parts(b)
  return a_ms > b_ms or (a_ms == b_ms and a_sequence > b_sequence)
end

-- The last id that the group was given (nil when there is no such group), and the number of groups of the stream.
local function group_of(key, group)
  if redis.call('EXISTS', key) == 0 then
    return nil, 0
  end
  local groups = redis.call('XINFO', 'GROUPS', key)
  for _, flat in ipairs(groups) do
    local info = {}
    for i = 1, #flat, 2 do
      info[flat[i]] = flat[i + 1]
    end
    if info['name'] == group then
      return info['last-delivered-id'], #groups
    end
  end
  return nil, #groups
end

-- The consumer that an entry waits for, and how often it was delivered; nil when it waits for none, also because the
-- stream is gone. A stream without the group is an error, NOGROUP.
local function holder_of(key, group, id)
  if redis.call('EXISTS', key) == 0 then
    return nil, 0
  end
  local row = redis.call('XPENDING', key, group, id, id, 1)[1]
  if row then
    return row[2], row[4]
  end
  return nil, 0
end

-- Acknowledges an entry and, unless other groups read the stream too, removes it and all that are done with.
local function acknowledge(key, group, id)
  local done = redis.call('XACK', key, group, id)
  local last, groups = group_of(key, group)
  if groups == 0 then
    redis.call('XDEL', key, id)
  elseif groups == 1 and last then
    redis.call('XDEL', key, id)
    local pending = redis.call('XPENDING', key, group)
    local least = last
    if pending[1] > 0 then
      least = pending[2]
    end
    redis.call('XTRIM', key, 'MINID', least)
  end
  return done
end

-- Whether an instance of a task came from a queue that machines share: it is named `queue/id`.
local function is_shared(instance)
  return string.find(instance, '/', 1, true) ~= nil
end

-- Whether {owner, fence, instance}, which is known of a task, is a later owner or a later run of it than mine. Numbers are
-- compared only where one clock gave them out: this server for shared instances, the machine for its own. A later start
-- of the same machine goes on with the same run.
local function is_later(known, machine, fence, instance)
  local owner, number, other = known[1], tonumber(known[2] or '') or 0, known[3]
  if not other or number <= tonumber(fence) then
    return false
  end
  if other == instance then
    return owner ~= machine
  end
  if is_shared(other) then
    return is_shared(instance)
  end
  return owner == machine and not is_shared(instance)
end

