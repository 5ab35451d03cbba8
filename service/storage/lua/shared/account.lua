-- What an account was charged for, as service/domain/charges.py has it.

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
  stray(state, reservation, now + UNKNOWN_SETTLES)
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
