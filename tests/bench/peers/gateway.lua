-- A gateway in Lua for nginx: it checks the bearer token, holds and settles a quota in Valkey by one script each,
-- forwards the upload with the vendor's key, and stores the task in Valkey, where it is read.
--
-- The client of Valkey is the few lines that this takes, because Debian's (lua-nginx-redis) depends on every module of
-- nginx. An upload is complete before a quota is held for it, as in the gateway. It lies in one buffer of nginx, which
-- is sent from there; reading it as one string of Lua took twice the time and memory. Options keep their names.
local cjson = require "cjson.safe"

local CHUNK_BYTES = 65536
local HEAD_BYTES = 4096 -- of a body, which have to hold the head of the image's part
local MAX_BODY_BYTES = 32 * 1024 * 1024
local TASK_SECONDS = 7 * 86400
local TIMEOUT_MS = 30 * 1000
local IDLE_MS = 60 * 1000
local POOL = 512
local QUOTA = "1000000000"
local TASK = '{"id":"%s","kind":"%s","state":"running","created_at":"%s","updated_at":"%s","finished_at":null,'
    .. '"upstream_id":%s,"artifacts":[],"error":null,"links":{"self":"%s"}}'
local SUBMIT_PATHS = {
    ["upscale"] = "/api/submit_task",
    ["vectorize"] = "/api/submit_vector_task",
    ["face-enhance"] = "/api/submit_face_enhance_task",
    ["seamless"] = "/api/submit_seamless_task",
}

local function script(source)
    local hash = ngx.sha1_bin(source):gsub(".", function(byte) return ("%02x"):format(byte:byte()) end)
    return { source = source, hash = hash }
end

-- Hold one task of a tenant's quota: 1, or 0 if none is left.
local HOLD = script [[
    local held = redis.call('HMGET', KEYS[1], 'used', 'held')
    if (tonumber(held[1]) or 0) + (tonumber(held[2]) or 0) >= tonumber(ARGV[1]) then return 0 end
    redis.call('HINCRBY', KEYS[1], 'held', 1)
    return 1
]]
-- Use what was held, and store the task; without a task give it back.
local SETTLE = script [[
    redis.call('HINCRBY', KEYS[1], 'held', -1)
    if ARGV[1] == '' then return 0 end
    redis.call('HINCRBY', KEYS[1], 'used', 1)
    redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
    return 1
]]

local config

local function answer(status, code)
    ngx.status = status
    ngx.print('{"code":"', code, '"}')
    return ngx.exit(ngx.HTTP_OK)
end

-- Send one command to Valkey; its reply (nil where that is null), and why there is none.
local function redis(...)
    local words = { ... }
    local parts = { "*", #words, "\r\n" }
    for _, word in ipairs(words) do
        parts[#parts + 1] = "$" .. #word .. "\r\n"
        parts[#parts + 1] = word
        parts[#parts + 1] = "\r\n"
    end
    local socket = ngx.socket.tcp()
    socket:settimeout(TIMEOUT_MS)
    local sent, reason = socket:connect(unpack(config.redis))
    if sent then sent, reason = socket:send(parts) end
    local line
    if sent then line, reason = socket:receive() end
    if not line then return nil, reason end
    local kind, reply = line:sub(1, 1), line:sub(2)
    if kind == "$" then
        local length = tonumber(reply)
        reply = nil
        if length >= 0 then
            reply, reason = socket:receive(length + 2)
            if not reply then return nil, reason end
            reply = reply:sub(1, length)
        end
    elseif kind == ":" then
        reply = tonumber(reply)
    end
    socket:setkeepalive(IDLE_MS, POOL)
    if kind == "-" then return nil, reply end
    return reply
end

local function run(what, ...)
    local reply, reason = redis("EVALSHA", what.hash, ...)
    if reason and reason:find("NOSCRIPT", 1, true) then reply, reason = redis("EVAL", what.source, ...) end
    return reply, reason
end

local function tenant()
    local token = (ngx.var.http_authorization or ""):match("^Bearer (%S+)$")
    return token and ngx.shared.tokens:get(token)
end

-- Read the whole body and make it the vendor's: its key in front, and its name for the image. True, or the refusal.
local function read_body()
    local left = tonumber(ngx.var.http_content_length)
    if not left then return 411 end
    if left > MAX_BODY_BYTES then return 413 end
    local boundary = (ngx.var.http_content_type or ""):match('boundary="?([^";]+)')
    local socket = ngx.req.socket()
    if not boundary or not socket then return 400 end
    socket:settimeout(TIMEOUT_MS)
    local chunk = socket:receive(math.min(left, HEAD_BYTES))
    if not chunk then return 400 end
    local from, to = chunk:find('name="image"', 1, true)
    if not from then return 422 end
    local key = table.concat {
        "--", boundary, '\r\nContent-Disposition: form-data; name="user_key"\r\n\r\n', config.user_key, "\r\n",
    }
    ngx.req.init_body(left + #key + #"input_")
    ngx.req.append_body(key)
    ngx.req.append_body(chunk:sub(1, from - 1))
    ngx.req.append_body('name="input_image"')
    ngx.req.append_body(chunk:sub(to + 1))
    left = left - #chunk
    while left > 0 do
        chunk = socket:receiveany(CHUNK_BYTES)
        if not chunk then return 400 end
        ngx.req.append_body(chunk)
        left = left - #chunk
    end
    ngx.req.finish_body()
    return true
end

-- Send the request's body to the vendor; its answer as a table, or nil and why there is none.
local function forward(path)
    local response = ngx.location.capture("/vendor" .. path, { method = ngx.HTTP_POST })
    if response.status ~= 200 or response.truncated then return nil, "HTTP " .. response.status end
    return cjson.decode(response.body)
end

local M = {}

function M.configure(given)
    config = given
    ngx.shared.tokens:set(given.token, "tenant")
end

function M.submit(kind)
    local name = tenant()
    if not name then return answer(401, "unauthenticated") end
    local read = read_body()
    if read ~= true then return answer(read, "invalid-body") end
    local quota = "quota:" .. name
    local held, reason = run(HOLD, "1", quota, QUOTA)
    if not held then return answer(503, "store-unavailable") end
    if held == 0 then return answer(429, "quota-exceeded") end
    local id = "task_" .. ngx.var.request_id
    local accepted
    accepted, reason = forward(SUBMIT_PATHS[kind])
    if not accepted or accepted.err_code ~= 0 or not accepted.task_id then
        run(SETTLE, "2", quota, id, "", "0")
        ngx.log(ngx.ERR, "not submitted: ", reason or accepted.err_msg)
        return answer(502, "vendor-failed")
    end
    local now = ngx.utctime():gsub(" ", "T") .. "Z"
    local path = "/v1/tasks/" .. id
    local task = TASK:format(id, kind, now, now, cjson.encode(accepted.task_id), path)
    run(SETTLE, "2", quota, "task:" .. name .. ":" .. id, task, tostring(TASK_SECONDS))
    ngx.status = 201
    ngx.header["Location"] = path
    ngx.header["Content-Length"] = #task
    ngx.print(task)
end

function M.read(id)
    local name = tenant()
    if not name then return answer(401, "unauthenticated") end
    local task, reason = redis("GET", "task:" .. name .. ":" .. id)
    if reason then return answer(503, "store-unavailable") end
    if not task then return answer(404, "task-not-found") end
    ngx.header["Content-Length"] = #task
    ngx.print(task)
end

return M
