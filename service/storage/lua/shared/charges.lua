-- What an account was charged for, as service/domain/charges.py has it.

local function owe(account, kind, sign)
  local owing, price = account.state.owing, account.policy.max_price[kind]
  owing.tasks = math.max(owing.tasks + sign, 0)
  if price then
    owing.money = math.max(owing.money + sign * price, 0)
  else
    owing.unpriced = math.max(owing.unpriced + sign, 0)
  end
end

local function explain(state, count, money)
  local owing = state.owing
  state.unexplained_count = state.unexplained_count + math.max(count - owing.tasks, 0)
  if owing.unpriced == 0 then
    state.unexplained_money = state.unexplained_money + math.max(money - owing.money, 0)
  end
  owing.tasks = math.max(owing.tasks - count, 0)
  owing.money = math.max(owing.money - money, 0)
  if owing.tasks == 0 then
    owing.money, owing.unpriced = 0, 0
  end
end

local function quieten(state, figures, now, alone)
  if not figures.count or not figures.money then
    state.blind = state.blind or state.owing.tasks > 0
  elseif state.open == 0 and (alone or not state.blind) and now - state.unknown_at >= UNKNOWN_SETTLES then
    state.owing, state.blind = {tasks = 0, money = 0, unpriced = 0}, false
  end
end

local function wonder(state, id, reservation, alone, now)
  local before = reservation.before
  state.unknown_at = now
  if alone and before then
    state.doubt = {reservation = id, seq = reservation.seq, since = now, count = before.count, money = before.money}
  end
end

local function is_price(count, money)
  return (count == 1 and money == 0) or (count == 0 and money >= 0)
end

local function resolve(state, figures, source, sent, kind)
  local doubt = state.doubt
  if not doubt or doubt.suggests or not figures.count or not figures.money or sent < doubt.since then
    return
  end
  local count, money, others = doubt.count - figures.count, doubt.money - figures.money, state.seq - doubt.seq
  local own = {count = 0, money = 0}
  if others == 1 and source == 'submit' and not state.charged_late then
    own = (count > 0 or not kind) and {count = 1, money = 0} or (state.prices and state.prices[kind])
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

local function learn(account, kind, before, after, now, alone)
  local state, count, money = account.state, 0, 0
  if not alone or not after.count or not after.money then
    return
  end
  if before then
    count, money = before.count - after.count, before.money - after.money
  end
  local charged = count ~= 0 or money ~= 0
  if before and is_price(count, money) then
    state.charged_late = not charged
  end
  if now - state.unknown_at >= UNKNOWN_SETTLES then
    state.owing, state.blind = {tasks = 0, money = 0, unpriced = 0}, false
    if not charged then
      owe(account, kind, 1)
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
