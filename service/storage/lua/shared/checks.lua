-- What is stored of a check that did not end its task.
-- USES: store

-- Returns how long after a check the next one is due (ms). A watched task is checked each time; otherwise the older it is,
-- the less often. Checks that failed in a row are repeated with exponential back-off.
local function next_check_delay(interval, age, failures, is_watched)
  if failures > 0 then
    return math.min(interval * 2 ^ failures, math.max(MAX_CHECK_BACKOFF_MS, interval))
  elseif is_watched then
    return interval
  end
  return math.max(math.min(math.floor(age / AGE_PER_CHECK_INTERVAL), MAX_CHECK_INTERVAL_MS), interval)
end

-- Applies that the upstream still works on a task.
local function apply_running(task, wall)
  task.not_found_ms, task.not_found_at, task.unresolved_ms, task.unresolved_at = nil, nil, nil, nil
  task.last_checked_at, task.failed_checks = wall, nil
  if task.state == 'queued' then
    task.state, task.updated_at, task.version = 'running', wall, task.version + 1
  end
end

-- Returns when the next check of a task is due, in the ledger's time.
local function next_check_at(task, watched_key, interval, now, wall)
  local is_watched = task.webhook_url or redis.call('EXISTS', watched_key) == 1
  return now + next_check_delay(interval, wall - task.created_at, task.failed_checks or 0, is_watched)
end

-- Stores a task, and publishes it if that makes a version later than `old_version`. Returns it as it is stored.
local function save_task(key, id, task, old_version, keep_ms, channel, wall)
  local packed = cmsgpack.pack(task)
  redis.call('SET', key, packed, 'PX', keep_ms)
  if task.version > old_version then
    redis.call('PUBLISH', channel, '\147' .. cmsgpack.pack(id, wall) .. packed)  -- an array of three
  end
  return packed
end
