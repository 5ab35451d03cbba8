-- What is known of an account and what follows from it, as service/domain/balance.py has it.

-- The most that a task of some kind takes; 0 where nobody knows.
local function most(account, kind)
  local highest = account.state.highest
  return account.policy.max_price[kind] or (highest and highest[kind]) or 0
end

local function dearest(account)
  local found = 0
  for _, prices in ipairs({account.policy.max_price, account.state.highest or {}}) do
    for _, price in pairs(prices) do
      found = math.max(found, price)
    end
  end
  return found
end

-- Whether the figures stay above the floors, also after one more at this price, if there is to be one. Uses are spent
-- before money, so that money is of no help while uses are left that shall stay, or that one which must not take money
-- is on its way to.
local function can_pay(account, price, submissions)
  local state, policy = account.state, account.policy
  if not state.count then
    return true
  end
  local left = state.count.value - submissions
  if left > 0 or (state.count.value > 0 and policy.floor_count > 0) then
    return left > policy.floor_count
  elseif price and state.thrifty > 0 then
    return false
  elseif not state.money then
    return true
  end
  price = price or 0
  local each = submissions > 0 and dearest(account) or price
  if policy.floor_money > 0 and state.money.value + (left - 1) * each < policy.floor_money then
    return false
  end
  return state.money.value + left * price > policy.floor_money
end

local function can_look(state)
  return state.looks and state.newest and state.in_vain < MOST_IN_VAIN
end

local function is_stuck(state)
  return state.open == 0 and state.astray > 0
end

local function may_probe(account, purse)
  local state, policy = account.state, account.policy
  if purse == 'count_only' or can_look(state) then
    return false
  end
  local below_count = state.count and state.count.value > 0 and policy.floor_count > 0
  local below_money = state.money and state.money.value > 0 and policy.floor_money > 0
  return not (below_count or below_money)
end

local function pays(account, purse, kind)
  local state = account.state
  if purse ~= 'count_only' then
    return can_pay(account, most(account, kind), missing(state))
  elseif not state.count then
    return state.open == 0
  end
  return state.count.value - math.max(state.open, missing(state)) > account.policy.floor_count
end

local function standing(account, purse, kind, now)
  local state = account.state
  if state.status == 'invalid' or not account.kept then
    return 'invalid', 0
  end
  local exhausted = state.status == 'exhausted'
  if not exhausted and pays(account, purse, kind) then
    return 'pays', now
  end
  local waits = exhausted or is_stuck(state)
  if waits and may_probe(account, purse) and now >= state.probe_at then
    return 'probe', now
  end
  local at = now + ONE_AT_A_TIME
  if can_look(state) and (exhausted or state.open == 0) then
    at = math.max(state.looked + PROBE_INTERVAL, at)
  elseif waits then
    at = math.max(state.probe_at, at)
  end
  return 'exhausted', at
end

-- The price one more submission may have; nil where none is known.
local function price_to_hold(account, kind)
  local state = account.state
  if state.count and state.count.value > math.max(state.open, missing(state)) then
    return 0
  end
  return account.policy.max_price[kind] or (state.highest and state.highest[kind])
end

-- By how much a figure rose (or dropped, below zero), and what is known of it after an observation.
local function observed(known, value, source, sent, received)
  if not value then
    return 0, known
  elseif not known or sent > known.received then
    local change = known and value - known.value or 0
    return change, {value = value, sent = sent, received = received, source = source}
  elseif value < known.value then
    local latest = math.max(received, known.received)
    local lower = {value = value, sent = math.max(sent, known.sent), received = latest, source = source}
    return value - known.value, lower
  end
  return 0, known
end

local function close(state, status, received)
  state.status, state.probe_at, state.looked = status, received + PROBE_INTERVAL, received
end

local function observe(account, figures, source, sent, received, kind)
  local state, count, money = account.state, 0, 0
  if sent < state.reopened then
    return
  end
  resolve(state, figures, source, sent, kind)
  local begins = not state.count or not state.money
  count, state.count = observed(state.count, figures.count, source, sent, received)
  money, state.money = observed(state.money, figures.money, source, sent, received)
  if sent > state.rose then
    explain(state, math.max(-count, 0), math.max(-money, 0))
  end
  catch_up(state, figures, sent, received)
  local rises = count > 0 or money > 0
  if begins or rises then
    state.rose = received
  end
  if state.status == 'exhausted' and rises then
    state.status = 'open'
  end
  if state.status == 'open' and not can_pay(account, nil, 0) then
    close(state, 'exhausted', received)
  end
end

local function refuse(state, status, sent, received)
  local newest = math.max(state.count and state.count.sent or 0, state.money and state.money.sent or 0)
  if sent >= math.max(newest, state.reopened) then
    close(state, status, received)
    state.closed = sent
  end
end

local function accept(state, sent)
  if sent > state.closed then
    state.status = 'open'
  end
end

local function finished(state, id, figures, sent)
  if not figures.count or not figures.money or (state.newest and sent < state.newest.sent) then
    return
  end
  state.newest = {reservation = id, sent = sent, count = figures.count, money = figures.money}
  state.in_vain = 0
end
