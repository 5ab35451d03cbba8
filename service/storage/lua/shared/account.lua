-- What an account was charged for, as service/domain/charges.py has it.
-- USES: store

local function expect(account, kind, sign)
  local expected, price = account.state.expected, account.policy.max_price[kind]
  expected.tasks = math.max(expected.tasks + sign, 0)
  if price then
    expected.money = math.max(expected.money + sign * price, 0)
  else
    expected.unpriced = math.max(expected.unpriced + sign, 0)
  end
end

local function explain(state, count, money)
  local expected = state.expected
  state.unexplained_count = state.unexplained_count + math.max(count - expected.tasks, 0)
  expected.tasks = math.max(expected.tasks - count, 0)
  if expected.tasks == 0 then
    state.unexplained_money = state.unexplained_money + money + expected.taken
    state.expected = nothing()
    return
  end
  local own = expected.unpriced > 0 and money or math.min(money, expected.money)
  state.unexplained_money = state.unexplained_money + money - own
  expected.money = math.max(expected.money - own, 0)
  expected.taken = expected.taken + own
end

local function missing(state)
  return state.uncharged + state.astray
end

local function balance(state)
  if missing(state) == 0 then
    state.expected = nothing()
  end
end

local function landed(state, reservation)
  if reservation.thrifty then
    state.thrifty = state.thrifty - 1
    reservation.thrifty = false
  end
end

local function owe(state, reservation)
  state.uncharged = state.uncharged + 1
  if reservation.thrifty then
    state.thrifty = state.thrifty + 1
  end
  reservation.owes = true
end

local function paid(state, reservation)
  if reservation.owes then
    state.uncharged = state.uncharged - 1
    reservation.owes = false
  end
  landed(state, reservation)
  balance(state)
end

local function spare(account, reservation, lacked)
  if lacked then
    expect(account, reservation.kind, -1)
  end
  paid(account.state, reservation)
end

local function stray(state, reservation, at)
  if reservation.owes then
    state.uncharged = state.uncharged - 1
    state.astray = state.astray + 1
    state.astray_until = math.max(state.astray_until, at)
  end
  landed(state, reservation)
end

-- Whether the figures might have lacked a stray submission until now that its outcome is known.
local function found(state, reservation)
  local lacked = reservation.owes and reservation.settled > state.caught_up
  if lacked then
    state.astray = state.astray - 1
  end
  reservation.owes = false
  balance(state)
  return lacked
end

local function catch_up(state, figures, sent, received)
  if state.astray > 0 and figures.count and figures.money and sent >= state.astray_until then
    state.astray, state.caught_up = 0, received
    balance(state)
  end
end

-- Whether nothing else was open on its account since a reservation was sent.
local function by_itself(state, reservation)
  return reservation.alone and state.seq == reservation.seq
end

local function wonder(state, id, reservation, now)
  local before = reservation.before
  stray(state, reservation, now + LATE_CHARGE_MS)
  if by_itself(state, reservation) and reservation.clean and before then
    state.doubt = {reservation = id, seq = reservation.seq, since = now, count = before.count, money = before.money}
  end
end

local function is_price(count, money)
  return (count == 1 and money == 0) or (count == 0 and money >= 0)
end

local function resolve(state, figures, source, sent, kind)
  local doubt = state.doubt
  if not doubt or doubt.suggests or not figures.count or not figures.money or sent <= doubt.since then
    return
  end
  local count, money, others = doubt.count - figures.count, doubt.money - figures.money, state.seq - doubt.seq
  local own = {count = 0, money = 0}
  if others == 1 and source == 'submit' and not state.charged_late then
    local price = kind and state.prices and state.prices[kind]
    own = count > 0 and {count = 1, money = 0} or (price and {count = 0, money = price})
  elseif others > 1 or (others == 1 and source == 'check') then
    own = nil
  end
  if not own or not is_price(count - own.count, money - own.money) then
    state.doubt = nil
  elseif count ~= own.count or money ~= own.money then
    doubt.suggests = 'charged'
  elseif state.charged_late == false then
    doubt.suggests = 'not-charged'
  elseif others > 0 then
    state.doubt = nil
  end
end

-- Writes to the submission in doubt what was found out of it; `prefix` is that of the reservations' keys.
local function tell(account, prefix)
  local state, doubt = account.state, account.state.doubt
  if not doubt or not doubt.suggests then
    return
  end
  local reservation = unpacked(redis.call('GET', prefix .. doubt.reservation))
  if reservation then
    reservation.suggests = doubt.suggests
    if doubt.suggests == 'not-charged' then
      expect(account, reservation.kind, -1)
    end
    found(state, reservation)
    redis.call('SET', prefix .. doubt.reservation, cmsgpack.pack(reservation), 'KEEPTTL')
  end
  state.doubt = nil
end

local function learn(state, reservation, after)
  local before = reservation.before
  if not after.count or not after.money or reservation.sent < state.reopened then
    return
  end
  if before then
    local count, money = before.count - after.count, before.money - after.money
    if count == 0 and money == 0 then
      state.charged_late = true
    elseif by_itself(state, reservation) and reservation.clean and is_price(count, money)
      and count == (reservation.use and 1 or 0) then
      state.charged_late = false
    end
  end
  if state.charged_late == false then
    paid(state, reservation)
  end
end

local function conclude(state, reservation, figures, asked, now)
  if not figures.count or not figures.money or asked < state.reopened then
    stray(state, reservation, now)
  else
    paid(state, reservation)
  end
end

local function receipt(account, reservation, figures, succeeded)
  local state, kind, before, told = account.state, reservation.kind, reservation.before, figures
  local observed_end = figures.count and figures.money
  if not observed_end and not state.charged_late and reservation.after then
    told = reservation.after
  end
  if by_itself(state, reservation) and reservation.clean and before and told.count and told.money then
    local count, money = before.count - told.count, before.money - told.money
    if is_price(count, money) and money <= (account.policy.max_price[kind] or money) then
      if money > 0 then
        state.prices, state.highest = state.prices or {}, state.highest or {}
        state.prices[kind] = money
        state.highest[kind] = math.max(state.highest[kind] or 0, money)
      end
      if count > 0 or money > 0 or (observed_end and not succeeded) then
        return {count = count, money = money, basis = (succeeded or observed_end) and 'observed' or 'estimated'}
      end
    end
  end
  local left = told.count or (state.count and state.count.value)
  if reservation.use or (reservation.use == nil and left and left > 0) then
    return {count = 1, money = 0, basis = 'estimated'}
  end
  local price = state.prices and state.prices[kind] or (left and account.policy.max_price[kind])
  if price then
    return {count = 0, money = price, basis = 'estimated'}
  end
  return {count = 0, money = 0, basis = 'unknown'}
end

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
  return state.looks and state.newest and state.in_vain < MAX_FAILED_BALANCE_CHECKS
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
  local at = now + EXCLUSIVE_RETRY_MS
  if can_look(state) and (exhausted or state.open == 0) then
    at = math.max(state.looked + PROBE_INTERVAL_MS, at)
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
  state.status, state.probe_at, state.looked = status, received + PROBE_INTERVAL_MS, received
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
