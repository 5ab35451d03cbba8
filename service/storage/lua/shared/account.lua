-- An upstream account: what it was charged for, what is known of its balance, and whether it can take a submission.
-- USES: store
--
-- The balance becomes known late and out of order, and the vendor charges either at the submit or on completion: the known
-- balance may lack charges. A charge is pending while its submission is open and may be missing in the balance. It is
-- untracked once the submission ended without a balance, or its outcome is unknown. A drop that no submission of the gateway
-- explains is the spending of another user of the key.

-- Adds a submission to those the balance may drop for, or removes it with a sign of -1.
local function add_expected_charge(account, kind, sign)
  local expected, price = account.state.expected_drop, account.policy.max_price[kind]
  expected.charges = math.max(expected.charges + sign, 0)
  if price then
    expected.max_fen = math.max(expected.max_fen + sign * price, 0)
  else
    expected.unpriced = math.max(expected.unpriced + sign, 0)
  end
end

-- Attributes a drop of the balance to the expected charges; the rest is unexplained. Once each of them is known to have
-- taken a use, none of them can have taken money.
local function attribute_drop(state, count, money)
  local expected = state.expected_drop
  state.unexplained_count = state.unexplained_count + math.max(count - expected.charges, 0)
  expected.charges = math.max(expected.charges - count, 0)
  if expected.charges == 0 then
    state.unexplained_money_fen = state.unexplained_money_fen + money + expected.attributed_fen
    state.expected_drop = no_expected_drop()
    return
  end
  local own = expected.unpriced > 0 and money or math.min(money, expected.max_fen)
  state.unexplained_money_fen = state.unexplained_money_fen + money - own
  expected.max_fen = math.max(expected.max_fen - own, 0)
  expected.attributed_fen = expected.attributed_fen + own
end

-- Returns how many charges the known balance may lack.
local function unaccounted_charges(state)
  return state.pending_charges + state.untracked_charges
end

local function clear_expected_drop(state)
  if unaccounted_charges(state) == 0 then
    state.expected_drop = no_expected_drop()
  end
end

local function clear_prepaid_only(state, reservation)
  if reservation.prepaid_only then
    state.pending_prepaid_only = state.pending_prepaid_only - 1
    reservation.prepaid_only = false
  end
end

local function mark_charge_pending(state, reservation)
  state.pending_charges = state.pending_charges + 1
  if reservation.prepaid_only then
    state.pending_prepaid_only = state.pending_prepaid_only + 1
  end
  reservation.charge_pending = true
end

-- The known balance includes what this submission took, if it took anything.
local function clear_pending_charge(state, reservation)
  if reservation.charge_pending then
    state.pending_charges = state.pending_charges - 1
    reservation.charge_pending = false
  end
  clear_prepaid_only(state, reservation)
  clear_expected_drop(state)
end

-- The submission takes nothing. `was_expected` says whether the known balance may have lacked its charge until now.
local function cancel_expected_charge(account, reservation, was_expected)
  if was_expected then
    add_expected_charge(account, reservation.kind, -1)
  end
  clear_pending_charge(account.state, reservation)
end

-- The charge may be missing in every balance that was requested before `until_at`.
local function mark_untracked(state, reservation, until_at)
  if reservation.charge_pending then
    state.pending_charges = state.pending_charges - 1
    state.untracked_charges = state.untracked_charges + 1
    state.untracked_until = math.max(state.untracked_until, until_at)
  end
  clear_prepaid_only(state, reservation)
end

-- Resolves an untracked charge whose outcome became known. Returns whether the known balance may have lacked it until now.
-- The times alone do not decide that: a reset of the clock leaves those of a reservation that it does not reach. Without the
-- counter the account would then count a charge too few from there on, and accept a submission that it can't pay.
local function resolve_untracked(state, reservation)
  local was_missing = reservation.charge_pending and state.untracked_charges > 0
    and reservation.settled_at > state.reconciled_at
  if was_missing then
    state.untracked_charges = state.untracked_charges - 1
  end
  reservation.charge_pending = false
  clear_expected_drop(state)
  return was_missing
end

-- A balance that was requested late enough includes all untracked charges.
local function reconcile_balance(state, balance, sent_at, received_at)
  if state.untracked_charges > 0 and balance.count and balance.money_fen and sent_at >= state.untracked_until then
    state.untracked_charges, state.reconciled_at = 0, received_at
    clear_expected_drop(state)
  end
end

-- Returns whether no other submission was open on the account since this one was dispatched.
local function was_exclusive(state, reservation)
  return reservation.exclusive and state.submission_seq == reservation.submission_seq
end

-- The outcome of a submission is unknown. If it was the only one on its account, the next balance may show its charge.
local function start_inference(state, id, reservation, now)
  local before = reservation.balance_before
  mark_untracked(state, reservation, now + LATE_CHARGE_MS)
  if was_exclusive(state, reservation) and reservation.balance_exact and before then
    state.pending_inference = {
      reservation = id, submission_seq = reservation.submission_seq, unknown_at = now, count = before.count,
      money_fen = before.money_fen,
    }
  end
end

-- Returns whether one task can cause this drop: one use, or money, or nothing.
local function is_single_charge(count, money)
  return (count == 1 and money == 0) or (count == 0 and money >= 0)
end

-- Infers from the first balance after an unknown outcome whether that submission was charged. Nothing else may have happened
-- on the account since, except the one submission (of `kind`) whose response this is.
local function infer_unknown_charge(state, balance, source, sent_at, kind)
  local inference = state.pending_inference
  if not inference or inference.inferred_charge or sent_at <= inference.unknown_at
    or not balance.count or not balance.money_fen then
    return
  end
  local count, money = inference.count - balance.count, inference.money_fen - balance.money_fen
  local others, own = state.submission_seq - inference.submission_seq, {count = 0, money_fen = 0}
  if others == 1 and source == 'submit' and not state.charges_on_completion then
    local price = kind and state.last_price and state.last_price[kind]
    own = count > 0 and {count = 1, money_fen = 0} or (price and {count = 0, money_fen = price})
  elseif others > 1 or (others == 1 and source == 'check') then
    own = nil
  end
  if not own or not is_single_charge(count - own.count, money - own.money_fen) then
    state.pending_inference = nil
  elseif count ~= own.count or money ~= own.money_fen then
    inference.inferred_charge = 'charged'
  elseif state.charges_on_completion == false then
    inference.inferred_charge = 'not-charged'
  elseif others > 0 then
    state.pending_inference = nil
  end
end

-- Stores a finished inference in its reservation; `prefix` is that of the keys of reservations.
local function store_inference(account, prefix)
  local state, inference = account.state, account.state.pending_inference
  if not inference or not inference.inferred_charge then
    return
  end
  local reservation = decode(redis.call('GET', prefix .. inference.reservation))
  if reservation then
    reservation.inferred_charge = inference.inferred_charge
    if inference.inferred_charge == 'not-charged' then
      add_expected_charge(account, reservation.kind, -1)
    end
    resolve_untracked(state, reservation)
    redis.call('SET', prefix .. inference.reservation, cmsgpack.pack(reservation), 'KEEPTTL')
  end
  state.pending_inference = nil
end

-- Learns from the response to a submission when the vendor charges: on completion if the balance did not change, at the
-- submit if an exclusive submission took what was expected.
local function learn_charge_timing(state, reservation, after)
  local before = reservation.balance_before
  if not after.count or not after.money_fen or reservation.dispatched_at < state.reopened_at then
    return
  end
  if before then
    local count, money = before.count - after.count, before.money_fen - after.money_fen
    if count == 0 and money == 0 then
      state.charges_on_completion = true
    elseif was_exclusive(state, reservation) and reservation.balance_exact and is_single_charge(count, money)
      and count == (reservation.expects_prepaid and 1 or 0) then
      state.charges_on_completion = false
    end
  end
  if state.charges_on_completion == false then
    clear_pending_charge(state, reservation)
  end
end

-- A task has ended: its balance, which is observed, includes its charge. Without a balance the charge is untracked.
local function finish_charge(state, reservation, balance, requested_at, now)
  if not balance.count or not balance.money_fen or requested_at < state.reopened_at then
    mark_untracked(state, reservation, now)
  else
    clear_pending_charge(state, reservation)
  end
end

-- Returns what an ended task cost, and stores its price if that was observed. The drop of the balance is its cost if nothing
-- else was open on the account and the drop is one that a single task within the operator's maximum can cause. A failed task
-- has no balance: if the vendor charges at the submit, the response to that shows what it took, but only as an estimate,
-- since it may have been given back. Otherwise the cost is estimated: a use, or the last price of the kind, or its maximum.
local function compute_cost(account, reservation, balance, succeeded)
  local state, kind, before, after = account.state, reservation.kind, reservation.balance_before, balance
  local has_final_balance = balance.count and balance.money_fen
  if not has_final_balance and not state.charges_on_completion and reservation.balance_after then
    after = reservation.balance_after
  end
  if was_exclusive(state, reservation) and reservation.balance_exact and before and after.count and after.money_fen then
    local count, money = before.count - after.count, before.money_fen - after.money_fen
    if is_single_charge(count, money) and money <= (account.policy.max_price[kind] or money) then
      if money > 0 then
        state.last_price, state.max_observed_price = state.last_price or {}, state.max_observed_price or {}
        state.last_price[kind] = money
        state.max_observed_price[kind] = math.max(state.max_observed_price[kind] or 0, money)
      end
      if count > 0 or money > 0 or (has_final_balance and not succeeded) then
        return {count = count, money_fen = money, basis = (succeeded or has_final_balance) and 'observed' or 'estimated'}
      end
    end
  end
  local remaining = after.count or (state.count and state.count.value)
  if reservation.expects_prepaid or (reservation.expects_prepaid == nil and remaining and remaining > 0) then
    return {count = 1, money_fen = 0, basis = 'estimated'}
  end
  local price = state.last_price and state.last_price[kind] or (remaining and account.policy.max_price[kind])
  if price then
    return {count = 0, money_fen = price, basis = 'estimated'}
  end
  return {count = 0, money_fen = 0, basis = 'unknown'}
end

-- Returns the most that a task of a kind can cost; 0 if no price is known.
local function max_price_of_kind(account, kind)
  local highest = account.state.max_observed_price
  return account.policy.max_price[kind] or (highest and highest[kind]) or 0
end

local function max_price_any_kind(account)
  local max_price = 0
  for _, prices in ipairs({account.policy.max_price, account.state.max_observed_price or {}}) do
    for _, price in pairs(prices) do
      max_price = math.max(max_price, price)
    end
  end
  return max_price
end

-- Returns whether the known balance, less `missing` submissions it may lack, stays above the floors, also after one more
-- submission at `price` (nil for none). Uses are spent before money, so money is of no help while uses remain that must
-- stay, or while a submission that must not take money may take the last use. Any of the missing may cost more than this.
local function stays_above_floors(account, price, missing)
  local state, policy = account.state, account.policy
  if not state.count then
    return true
  end
  local remaining = state.count.value - missing
  if remaining > 0 or (state.count.value > 0 and policy.floor_count > 0) then
    return remaining > policy.floor_count
  elseif price and state.pending_prepaid_only > 0 then
    return false
  elseif not state.money then
    return true
  end
  price = price or 0
  local missing_price = missing > 0 and max_price_any_kind(account) or price
  if policy.floor_money_fen > 0 and state.money.value + (remaining - 1) * missing_price < policy.floor_money_fen then
    return false
  end
  return state.money.value + remaining * price > policy.floor_money_fen
end

-- Returns whether checking a finished task again returns the current balance, at no cost.
local function has_live_balance_check(state)
  return state.live_balance_checks and state.last_finished_task and state.failed_balance_checks < MAX_FAILED_BALANCE_CHECKS
end

-- Returns whether the balance lacks charges that no response to come will show.
local function needs_balance_check(state)
  return state.open_submissions == 0 and state.untracked_charges > 0
end

-- Returns whether an ordinary submission may test an exhausted account: not if it must not spend money, not if the balance
-- can be read at no cost, and not while a floor keeps it closed.
local function can_probe(account, spending_mode)
  local state, policy = account.state, account.policy
  if spending_mode == 'count_only' or has_live_balance_check(state) then
    return false
  end
  local is_count_floor = state.count and state.count.value > 0 and policy.floor_count > 0
  local is_money_floor = state.money and state.money.value > 0 and policy.floor_money_fen > 0
  return not (is_count_floor or is_money_floor)
end

-- Returns whether an open account can pay for one more submission. A tenant that spends no money needs a use for each open
-- submission; while the count is unknown its submissions run one at a time.
local function can_pay(account, spending_mode, kind)
  local state = account.state
  if spending_mode ~= 'count_only' then
    return stays_above_floors(account, max_price_of_kind(account, kind), unaccounted_charges(state))
  elseif not state.count then
    return state.open_submissions == 0
  end
  return state.count.value - math.max(state.open_submissions, unaccounted_charges(state)) > account.policy.floor_count
end

-- Returns whether an account can take a submission ('available', 'probe', 'exhausted' or 'invalid'), and when to ask again.
local function account_availability(account, spending_mode, kind, now)
  local state = account.state
  if state.status == 'invalid' or not account.is_registered then
    return 'invalid', 0
  end
  local is_exhausted = state.status == 'exhausted'
  if not is_exhausted and can_pay(account, spending_mode, kind) then
    return 'available', now
  end
  local needs_probe = is_exhausted or needs_balance_check(state)
  if needs_probe and can_probe(account, spending_mode) and now >= state.next_probe_at then
    return 'probe', now
  end
  local retry_at = now + EXCLUSIVE_RETRY_MS
  if has_live_balance_check(state) and (is_exhausted or state.open_submissions == 0) then
    retry_at = math.max(state.last_balance_check_at + PROBE_INTERVAL_MS, retry_at)
  elseif needs_probe then
    retry_at = math.max(state.next_probe_at, retry_at)
  end
  return 'exhausted', retry_at
end

-- Returns the money one more submission may take; nil if no price is known.
local function price_hold(account, kind)
  local state = account.state
  if state.count and state.count.value > math.max(state.open_submissions, unaccounted_charges(state)) then
    return 0
  end
  return account.policy.max_price[kind] or (state.max_observed_price and state.max_observed_price[kind])
end

-- Returns by how much a reading changed, and the reading after an observation. One requested after the known reading was
-- received replaces it; one that overlaps it may only lower it.
local function update_reading(reading, value, source, sent_at, received_at)
  if not value then
    return 0, reading
  elseif not reading or sent_at > reading.received_at then
    local change = reading and value - reading.value or 0
    return change, {value = value, sent_at = sent_at, received_at = received_at, source = source}
  elseif value < reading.value then
    return value - reading.value, {
      value = value, sent_at = math.max(sent_at, reading.sent_at), received_at = math.max(received_at, reading.received_at),
      source = source,
    }
  end
  return 0, reading
end

local function close_account(state, status, received_at)
  state.status, state.next_probe_at, state.last_balance_check_at = status, received_at + PROBE_INTERVAL_MS, received_at
end

-- Takes in the balance of a response to a submission of `kind`, or to a check. A rise reopens an exhausted account, reaching
-- the floors closes it. A drop is not attributed if the balance rose after it was requested.
local function observe(account, balance, source, sent_at, received_at, kind)
  local state, count_change, money_change = account.state, 0, 0
  if sent_at < state.reopened_at then
    return
  end
  infer_unknown_charge(state, balance, source, sent_at, kind)
  local was_unknown = not state.count or not state.money
  count_change, state.count = update_reading(state.count, balance.count, source, sent_at, received_at)
  money_change, state.money = update_reading(state.money, balance.money_fen, source, sent_at, received_at)
  if sent_at > state.last_increase_at then
    attribute_drop(state, math.max(-count_change, 0), math.max(-money_change, 0))
  end
  reconcile_balance(state, balance, sent_at, received_at)
  local has_risen = count_change > 0 or money_change > 0
  if was_unknown or has_risen then
    state.last_increase_at = received_at
  end
  if state.status == 'exhausted' and has_risen then
    state.status = 'open'
  end
  if state.status == 'open' and not stays_above_floors(account, nil, 0) then
    close_account(state, 'exhausted', received_at)
  end
end

-- The upstream refused a submission: the account can't pay, or is unknown to it. A refusal that is older than the known
-- balance closes nothing.
local function close_on_refusal(state, status, sent_at, received_at)
  local last_sent_at = math.max(state.count and state.count.sent_at or 0, state.money and state.money.sent_at or 0)
  if sent_at >= math.max(last_sent_at, state.reopened_at) then
    close_account(state, status, received_at)
    state.closed_at = sent_at
  end
end

-- The upstream accepted a submission: the account can pay, unless a later submission was refused.
local function open_on_acceptance(state, sent_at)
  if sent_at > state.closed_at then
    state.status = 'open'
  end
end

-- Stores the last finished task, which a balance check checks again, if it has a balance and no later check has been stored.
local function store_finished_task(state, id, balance, sent_at)
  local last = state.last_finished_task
  if not balance.count or not balance.money_fen or (last and sent_at < last.sent_at) then
    return
  end
  state.last_finished_task = {reservation = id, sent_at = sent_at, count = balance.count, money_fen = balance.money_fen}
  state.failed_balance_checks = 0
end
