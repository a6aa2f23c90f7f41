"""The account of a run's time: nothing lost or counted twice, over attempts that end badly."""

import pytest

from lwm.report.goodput import CATEGORIES, Account, table


class Clock:
  """Stands still until told how long something took."""

  def __init__(self, now):
    self.now = now

  def __call__(self):
    return self.now

  def pass_(self, seconds):
    self.now += seconds


def train_record(total_steps, seconds, starved):
  return {
    "kind": "train",
    "total_steps": total_steps,
    "seconds": seconds,
    "starved_seconds": starved,
  }


def run_step(account, clock, total_steps, seconds, starved=0.0):
  clock.pass_(seconds)
  assert account.lap("step") == seconds
  account.move("step", "input", starved)
  return train_record(total_steps, seconds, starved)


def nonzero(account):
  return {name: seconds for name, seconds in account.seconds.items() if seconds}


def test_each_second_belongs_to_one_category():
  clock = Clock(1000.0)
  account = Account(clock)
  clock.pass_(5)
  with account.spend("compile"):
    clock.pass_(20)
  clock.pass_(1)
  account.steps_begin()
  run_step(account, clock, 1, 4.0, starved=3.0)
  run_step(account, clock, 2, 2.0)
  with account.spend("evaluation"):
    clock.pass_(3)
  with account.spend("checkpoint"):
    clock.pass_(0.5)
  clock.pass_(0.25)
  account.lap("other")
  assert nonzero(account) == {
    "step": 3.0,
    "input": 3.0,
    "compile": 20,
    "evaluation": 3,
    "checkpoint": 0.5,
    "other": 6.25,
  }
  record = account.record(2)
  assert record["wall_seconds"] == clock.now - 1000 == 35.75
  assert record["goodput"] == 3 / 35.75
  assert (record["time"], record["attempts"], record["total_steps"]) == (clock.now, 1, 2)


def test_attempts_add_up_however_they_end():
  clock = Clock(0.0)
  account = Account(clock)
  with account.spend("compile"):
    clock.pass_(10)
  account.steps_begin()
  records = [account.record(0)]
  records += [run_step(account, clock, step, 2.0, starved=0.5) for step in (1, 2, 3)]
  with account.spend("checkpoint"):
    clock.pass_(1)
  account.steps_begin()
  records.append(account.record(3))
  # Killed in mid-step 6: steps 4 and 5 are on record, the checkpoint of step 3 is complete.
  records += [run_step(account, clock, step, 3.0, starved=1.0) for step in (4, 5)]
  clock.pass_(1.5)

  # Down for 100 s, then killed again while it compiles.
  clock.pass_(100)
  account = Account.resumed(records, 3, clock)
  assert nonzero(account) == {
    "step": 4.5,
    "input": 1.5,
    "compile": 10,
    "checkpoint": 1,
    "restart": 6,
  }
  records = [r for r in records if r["total_steps"] <= 3] + [account.record(3)]
  with account.spend("compile"):
    clock.pass_(5)

  clock.pass_(50)
  account = Account.resumed(records, 3, clock)
  assert account.attempts == 3
  clock.pass_(2)
  with account.spend("compile"):
    clock.pass_(10)
  account.steps_begin()
  assert nonzero(account) == {
    "step": 4.5,
    "input": 1.5,
    "compile": 10,
    "checkpoint": 1,
    # Steps 4 and 5 and what was begun of 6, twice down, twice starting up.
    "restart": 6 + 1.5 + 100 + 5 + 50 + 12,
  }
  records += [account.record(3), run_step(account, clock, 4, 2.0)]
  assert sum(account.seconds.values()) == clock.now
  # What is forgotten in the end counts once.
  account = Account.resumed(records, 3, clock)
  assert account.seconds["restart"] == 6 + 168.5 + 2
  assert sum(account.seconds.values()) == clock.now


def test_killed_before_the_first_checkpoint():
  clock = Clock(0.0)
  account = Account(clock)
  clock.pass_(1)
  account.steps_begin()
  records = [account.record(0), run_step(account, clock, 1, 2.0)]
  clock.pass_(7)
  account = Account.resumed(records, 0, clock)
  account.steps_begin()
  assert nonzero(account) == {"other": 1, "restart": 9}


def test_a_rollback():
  clock = Clock(0.0)
  account = Account(clock)
  account.steps_begin()
  records = [account.record(0)]
  records += [run_step(account, clock, step, 2.0, starved=0.5) for step in (1, 2, 3)]
  # A bad step, and the way back to step 1.
  clock.pass_(5)
  account.lap("restart")
  account.forget_steps(records, 1)
  assert nonzero(account) == {"step": 1.5, "input": 0.5, "restart": 9}
  records = records[:2] + [account.record(1)]
  account.steps_begin()
  records += [account.record(1), run_step(account, clock, 2, 3.0)]
  assert nonzero(account) == {"step": 4.5, "input": 0.5, "restart": 9}
  # What a later attempt reads is the same.
  assert Account.resumed(records, 2, clock).seconds == account.seconds


def test_a_late_clock_takes_nothing_away():
  clock = Clock(100.0)
  account = Account(clock)
  account.steps_begin()
  record = account.record(0)
  clock.now = 90.0
  account = Account.resumed([record], 0, clock)
  clock.pass_(1)
  account.steps_begin()
  assert nonzero(account) == {}


def test_records_from_before_there_were_accounts():
  clock = Clock(0.0)
  old = [{"kind": "train", "total_steps": 1, "seconds": 5.0}]
  account = Account.resumed(old, 1, clock)
  assert account.attempts == 1 and nonzero(account) == {}


def test_table():
  record = Account(Clock(0.0)).record(0)
  assert table(record) == "goodput 0.0% of 0s"
  record |= {
    "wall_seconds": 200.0,
    "goodput": 0.9,
    "attempts": 2,
    "step_seconds": 180.0,
    "restart_seconds": 19.8,
    "other_seconds": 0.2,
  }
  assert table(record).splitlines() == [
    "goodput 90.0% of 3m20s in 2 attempts",
    "  step          3m00s   90.0%",
    "  restart         20s    9.9%",
  ]


@pytest.mark.parametrize("category", CATEGORIES)
def test_records_name_all_categories(category):
  assert Account(Clock(0.0)).record(0)[f"{category}_seconds"] == 0
