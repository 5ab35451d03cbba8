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
