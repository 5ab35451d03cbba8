-- Sends one request, or the same one to many paths in turn, and prints what came of it as a line of JSON.
-- Arguments: the method, a file with a path on each line, a file with the body (or ""), and headers as "Name: value".

local requests, sent = {}, 0

function init(arguments)
  local paths = {}
  for path in io.lines(arguments[2]) do
    paths[#paths + 1] = path
  end
  wrk.method, wrk.path = arguments[1], paths[1]
  if arguments[3] ~= "" then
    local file = assert(io.open(arguments[3], "rb"))
    wrk.body = file:read("*a")
    file:close()
  end
  for position = 4, #arguments do
    local name, value = arguments[position]:match("^([^:]+): (.*)$")
    wrk.headers[name] = value
  end
  if #paths > 1 then  -- without a global `request`, wrk builds the request once and copies nothing
    for position, path in ipairs(paths) do
      requests[position] = wrk.format(nil, path)
    end
    request = function()
      sent = sent + 1
      return requests[(sent - 1) % #requests + 1]
    end
  end
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"microseconds": %d, "requests": %d, "refused": %d, "broken": %d, "p50": %d, "p99": %d}\n',
    summary.duration, summary.requests, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)
  ))
end
