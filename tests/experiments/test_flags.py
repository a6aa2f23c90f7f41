"""Each mistake in a flag ends in one sentence that names it."""

import pytest

from tests import programs

PROGRAM = """
from experiments import flags
from lwm.errors import UserError
CONFIG = flags.define_config()
def main(argv):
  if CONFIG.value.seed == 99:
    raise UserError("the seed is 99.")
  print(CONFIG.value.seed, CONFIG.value.stages[1].sequence_length, CONFIG.value.model.tied_head)
flags.run(main)
"""


def _run(*arguments):
  return programs.run(PROGRAM, *arguments)


def test_settings_are_flags():
  done = _run(
    "--config=configs/laptop.py",
    "--config.seed=7",
    "--config.stages[1].sequence_length=2048",
    "--config.model.tied_head",
  )
  assert done.stdout.split() == ["7", "2048", "True"], done.stderr


def test_help_names_the_config():
  done = _run("--help")
  assert "--config: Python file whose get_config()" in done.stdout, done.stdout


def test_a_group_that_is_none_is_built():
  program = PROGRAM.replace("CONFIG.value.seed,", "CONFIG.value.model.rope_scaling,")
  done = programs.run(
    program,
    "--config=configs/laptop.py",
    "--config.model.rope_scaling=build",
    "--config.model.rope_scaling.factor=4",
  )
  assert done.stdout.startswith("RopeScaling(factor=4.0, low_frequency_factor=1.0"), done.stderr


@pytest.mark.parametrize(
  "flag, named",
  [
    ("--config.sed=3", ["--config.sed", "did you mean 'seed'"]),
    ("--config.optimizer.peak_lr=1", ["config.optimizer has no setting 'peak_lr'"]),
    ("--config.seed=abc", ["--config.seed=abc", "whole number"]),
    ("--config.stages[1].peak_learning_rate=x", ["peak_learning_rate=x", "a number"]),
    ("--config.model.tied_head=maybe", ["tied_head=maybe", "true or false"]),
    ("--config.stages[7].steps=5", ["config.stages[7]", "4 entries"]),
    ("--config.stages=5", ["group of settings"]),
    ("--config.model.rope_scaling=8", ["rope_scaling=8", "`build` or `none`"]),
    ("--config.model.rope_scaling.factor=8", ["give --config.model.rope_scaling=build before"]),
    ("--config.model=build", ["config.model is a group of settings"]),
    ("--confg=5", ["confg"]),
    ("config.seed=3", ["'config.seed=3' is not a flag"]),
    ("--config.seed=99", ["the seed is 99."]),
  ],
)
def test_a_mistake_is_one_sentence(flag, named):
  done = _run("--config=configs/laptop.py", flag)
  assert done.returncode == 1
  assert len(done.stderr.strip().splitlines()) == 1, done.stderr
  assert done.stderr.startswith("error: ")
  assert all(name in done.stderr for name in named), done.stderr


@pytest.mark.parametrize(
  "config, named",
  [
    (["--config=configs/lapto.py"], ["there is no file 'configs/lapto.py'"]),
    (["--config=configs"], ["there is no file 'configs'"]),
    (["--config=configs/models.py"], ["configs/models.py", "get_config"]),
    (["--config=README.md"], ["this file cannot be used", "README.md, line"]),
    (["--config=configs/laptop.py:big"], ["too many positional arguments of get_config()"]),
    (["--config=configs/retrieval.py:longer"], ["it takes stages or fixed_theta or long"]),
    ([], ["--config"]),
  ],
)
def test_a_wrong_config_file_is_one_sentence(config, named):
  done = _run(*config)
  assert done.returncode == 1
  assert len(done.stderr.strip().splitlines()) == 1, done.stderr
  assert all(name in done.stderr for name in named), done.stderr
