"""Answers after prompts that are longer than a row, from JSON lines to a run."""

import json
import pathlib
import random
import re
import subprocess

import pytest

from tests import programs

CONFIG = """
from configs import models
from lwm.config.experiment import DatasetConfig, Experiment, MixtureEntry, Stage

def get_config(directory):
  return Experiment(
    tokenizer=f"{directory}/tokenizer.model",
    model=models.debug(text_vocab_size=290),
    datasets=[DatasetConfig("chat", f"{directory}/chat")],
    stages=[
      Stage(
        name="only",
        sequence_length=64,
        tokens_per_batch=1024,
        steps=3,
        warmup_steps=0,
        mixture=[MixtureEntry("chat")],
      )
    ],
  )
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
  return programs.run(f"experiments.{program}", *arguments)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> pathlib.Path:
  """40 records: an instruction of 400 to 800 tokens without loss, and an answer of three words."""
  directory = tmp_path_factory.mktemp("chat")
  generator = random.Random(0)
  words = ["the", "cat", "sees", "a", "red", "house", "and", "runs"]
  lines = []
  for number in range(40):
    # Each digit is one token.
    instruction = "".join(generator.choices("0123456789", k=400 + 10 * number))
    output = " ".join(generator.choices(words, k=3))
    lines.append(json.dumps({"instruction": instruction, "output": output}))
  (directory / "chat.jsonl").write_text("\n".join(lines))
  (directory / "config.py").write_text(CONFIG)
  done = run(
    "prepare_data",
    "--source=jsonl",
    f"--input={directory / 'chat.jsonl'}",
    "--fields=[instruction],output",
    f"--tokenizer={directory / 'tokenizer.model'}",
    "--train_tokenizer_vocab=290",
    f"--output={directory / 'chat'}",
  )
  assert done.returncode == 0, done.stderr
  return directory


def train(directory: pathlib.Path, policy: str, *arguments: str) -> subprocess.CompletedProcess:
  workdir = directory / f"run_{policy}_{len(arguments)}"
  return run(
    "train",
    f"--config={directory / 'config.py'}:{directory}",
    f"--workdir={workdir}",
    f"--config.datasets[0].long_documents={policy}",
    *arguments,
  )


def rows_without_a_target(output: str) -> tuple[int, int]:
  match = re.search(r"^only, chat: .*; rows without a target: ([\d,]+) of ([\d,]+)", output, re.M)
  empty, rows = (int(number.replace(",", "")) for number in match.groups())
  return empty, rows


def losses(output: str) -> list[float]:
  return [float(loss) for loss in re.findall(r"^only \d/3  *.*loss ([\d.]+)", output, re.M)]


@pytest.mark.slow
def test_cut_says_how_many_rows_teach_nothing(directory):
  done = train(directory, "cut")
  assert done.returncode == 0, done.stderr
  told = "only, chat: documents longer than a row of 64 tokens: 40 of 40 (long_documents='cut')"
  assert told in done.stdout and "'leave_out' or 'keep_end'" in done.stdout
  empty, rows = rows_without_a_target(done.stdout)
  assert 0.85 * rows < empty < rows


@pytest.mark.slow
def test_keep_end_trains_on_every_answer(directory):
  done = train(directory, "keep_end")
  assert done.returncode == 0, done.stderr
  assert rows_without_a_target(done.stdout) == (0, 40)
  assert re.search(r"; dropped: [\d,]+ of [\d,]+ tokens, 0 of [\d,]+ targets;", done.stdout)
  assert len(losses(done.stdout)) == 3 and min(losses(done.stdout)) > 1


@pytest.mark.slow
def test_leaving_out_everything_is_an_error_and_leaving_out_some_is_not(directory):
  done = train(directory, "leave_out")
  assert done.returncode == 1 and "Traceback" not in done.stderr
  assert done.stderr.strip().splitlines()[-1] == (
    f"error: Stage 'only' would learn nothing from dataset 'chat' ({directory / 'chat'}): 40 of 40 "
    "documents are longer than its sequence_length=64, and config.datasets[0].long_documents="
    "'leave_out' keeps none of the targets; set another value, or a larger sequence_length."
  )
  done = train(directory, "leave_out", "--config.stages[0].sequence_length=512")
  assert done.returncode == 0, done.stderr
  empty, rows = rows_without_a_target(done.stdout)
  assert empty == 0 < rows < 40
  assert len(losses(done.stdout)) == 3 and min(losses(done.stdout)) > 1
