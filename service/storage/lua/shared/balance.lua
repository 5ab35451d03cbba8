-- What is known of an account and what follows from it, as service/domain/balance.py has it.

-- Uses are spent before money, so that money is of no help while uses are left that shall stay.
local function can_pay(account, kind, submissions)
  local state, policy = account.state, account.policy
  if not state.count then
    return true
  end
  local left = state.count.value - submissions
  if left > 0 then
    return left > policy.floor_count
  elseif not state.money then
    return true
  end
  local price = kind and state.highest and state.highest[kind] or 0
  return state.money.value + left * price > policy.floor_money
end

local function may_probe(account, purse)
  local state, policy = account.state, account.policy
  if purse == 'count_only' then
    return false
  end
  local below_count = state.count and state.count.value > 0 and policy.floor_count > 0
  local below_money = state.money and state.money.value > 0 and policy.floor_money > 0
  return not (below_count or below_money)
end

local function standing(account, purse, kind, now)
  local state = account.state
  if state.status == 'invalid' or not account.kept then
    return 'invalid', 0
  elseif state.status == 'exhausted' then
    if may_probe(account, purse) and now >= state.probe_at then
      return 'probe', now
    end
    return 'exhausted', math.max(state.probe_at, now + ONE_AT_A_TIME)
  end
  local pays
  if purse ~= 'count_only' then
    pays = can_pay(account, kind, state.charged_late and state.open or state.sending)
  elseif state.count then
    pays = state.count.value - state.open > account.policy.floor_count
  else
    pays = state.open == 0
  end
  if pays then
    return 'pays', now
  end
  return 'exhausted', now + ONE_AT_A_TIME
end

-- The price one more submission may have; nil where none is known.
local function price_to_hold(account, kind)
  local state = account.state
  if state.count and state.count.value > state.open then
    return 0
  end
  return account.policy.max_price[kind] or (state.highest and state.highest[kind])
end

local function observed(known, value, source, sent, received)
  if not value then
    return false, known
  elseif not known or sent > known.received then
    return known ~= nil and value > known.value, {value = value, sent = sent, received = received, source = source}
  elseif value < known.value then
    local latest = math.max(received, known.received)
    return false, {value = value, sent = math.max(sent, known.sent), received = latest, source = source}
  end
  return false, known
end

local function observe(account, figures, source, sent, received)
  local state, rose_count, rose_money = account.state, false, false
  if sent < state.reopened then
    return
  end
  rose_count, state.count = observed(state.count, figures.count, source, sent, received)
  rose_money, state.money = observed(state.money, figures.money, source, sent, received)
  if state.status == 'exhausted' and (rose_count or rose_money) then
    state.status = 'open'
  end
  if state.status == 'open' and not can_pay(account, nil, 0) then
    state.status, state.probe_at = 'exhausted', received + PROBE_INTERVAL
  end
end

local function refuse(account, status, sent, received)
  local state = account.state
  local newest = math.max(state.count and state.count.sent or 0, state.money and state.money.sent or 0)
  if sent >= math.max(newest, state.reopened) then
    state.status, state.probe_at, state.closed = status, received + PROBE_INTERVAL, sent
  end
end

local function is_price(count, money)
  return (count == 1 and money == 0) or (count == 0 and money >= 0)
end

-- The upstream took a submission: the account is known and could pay, unless a later one was refused. If it had the
-- account to itself, it shows whether it was charged at once.
local function accept(account, reservation, after)
  local state, before = account.state, reservation.before
  if reservation.sent > state.closed then
    state.status = 'open'
  end
  if reservation.alone and state.seq == reservation.seq and before and after.count and after.money then
    if before.count == after.count and before.money == after.money then
      state.charged_late = true
    elseif is_price(before.count - after.count, before.money - after.money) then
      state.charged_late = false
    end
  end
end

local function receipt(account, kind, before, after, alone, succeeded)
  local state = account.state
  if alone and before and after.count and after.money then
    local count, money = before.count - after.count, before.money - after.money
    if is_price(count, money) and money <= (account.policy.max_price[kind] or money) then
      local charged = count > 0 or money > 0
      if charged then
        state.prices, state.highest = state.prices or {}, state.highest or {}
        state.prices[kind] = {count = count, money = money}
        state.highest[kind] = math.max(state.highest[kind] or 0, money)
      end
      if charged or not succeeded then
        return {count = count, money = money, basis = 'observed'}
      end
    end
  end
  if after.count and after.count > 0 then
    return {count = 1, money = 0, basis = 'estimated'}
  end
  local price = state.prices and state.prices[kind]
  if price then
    return {count = price.count, money = price.money, basis = 'estimated'}
  elseif after.count == 0 and account.policy.max_price[kind] then
    return {count = 0, money = account.policy.max_price[kind], basis = 'estimated'}
  end
  return {count = 0, money = 0, basis = 'unknown'}
end
