-- Queues the event that a tenant has reached a threshold of a limit, once for each window. A raised limit counts as another
-- one, so its thresholds are reached again.
-- USES: store, deliveries
-- KEYS     clock, tenant, webhook:queues
-- ARGV     MessagePack {id, name, window_start, limit, delivery, deliveries}: id is that of the delivery, name that of the
--          threshold; deliveries as in shared/deliveries.lua
-- RETURNS  {'queued', now}, or {'known', now} if it was queued before or there is no such tenant (any more)
local args = cmsgpack.unpack(ARGV[1])
local now, wall = advance_clock(KEYS[1])
local stored = redis.call('HMGET', KEYS[2], 'policy', 'warned')
local warned = decode(stored[2]) or {}
local last = warned[args.name]
local is_known
if last and args.window_start == last[1] then
  is_known = args.limit <= last[2]
elseif last and args.window_start < last[1] then
  -- The tasks of an earlier window may end later, or the server's clock has stepped back. Its event is kept for longer than
  -- its window is reported.
  is_known = redis.call('EXISTS', args.deliveries.delivery_prefix .. args.id) == 1
end
if not stored[1] or is_known then
  return {'known', now}
end
if not last or args.window_start >= last[1] then
  warned[args.name] = {args.window_start, args.limit}
  redis.call('HSET', KEYS[2], 'warned', cmsgpack.pack(warned))
end
args.delivery.created_at, args.delivery.attempts = wall, 0
enqueue_delivery(args.deliveries, args.id, args.delivery, 0, now, wall)
return {'queued', now}
