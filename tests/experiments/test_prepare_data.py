import json
import pathlib
import subprocess
import sys

import pytest

from lwm.data import Dataset

ROOT = pathlib.Path(__file__).parents[2]


def _run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "experiments.prepare_data", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_text_with_a_tokenizer_of_its_own_and_held_out_files(tmp_path):
  for folder, count in (("train", 5), ("validation", 2)):
    (tmp_path / folder).mkdir()
    for i in range(count):
      (tmp_path / folder / f"{i}.py").write_text(f"# the {i}th file of {folder}\n" * 3)
  (tmp_path / "train" / "bad.py").write_bytes(b"\xff")
  command = [
    "--source=text",
    f"--input={tmp_path / 'train'}",
    "--suffix=.py",
    f"--validation_input={tmp_path / 'validation'}",
    f"--tokenizer={tmp_path / 't.model'}",
    f"--output={tmp_path / 'out'}",
  ]
  done = _run(*command, "--train_tokenizer_vocab=280")
  assert done.returncode == 0, done.stderr
  train, validation, last = done.stdout.splitlines()
  dataset = Dataset(tmp_path / "out")
  tokens = dataset.manifest["splits"]["train"]["tokens"]
  entropy = dataset.unigram_entropy("train")["text"]
  assert train == f"train: 5 documents, {tokens} tokens, unigram entropy text {entropy:.3f} nats"
  assert validation.startswith("validation: 2 documents, ")
  assert last.startswith("1 bad records") and last.endswith(f"dataset: {tmp_path / 'out'}")

  again = _run(*command)
  assert again.returncode == 1
  assert again.stderr == (
    f"error: {tmp_path / 'out'} exists already: delete it, or name another --output.\n"
  )


def test_jsonl(tmp_path):
  lines = [json.dumps({"q": f"what is {i}", "a": "a number"}) for i in range(50)]
  (tmp_path / "chat.jsonl").write_text("\n".join(lines))
  done = _run(
    "--source=jsonl",
    f"--input={tmp_path / 'chat.jsonl'}",
    "--fields=[q],a",
    "--fields=[a],q",
    f"--tokenizer={tmp_path / 't.model'}",
    "--train_tokenizer_vocab=290",
    f"--output={tmp_path / 'out'}",
    "--validation_fraction=0.2",
  )
  assert done.returncode == 0, done.stderr
  splits = Dataset(tmp_path / "out").manifest["splits"]
  assert splits["train"]["documents"] + splits["validation"]["documents"] == 50


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--tokenizer=/nothing/t.model"], "no tokenizer file /nothing/t.model"),
    (["--validation_fraction=2"], "--validation_fraction=2.0 is not in"),
    (["--validation_fraction=0.5", "--validation_input=x"], "not both"),
    (["--output=gs://bucket/out"], "--output=gs://bucket/out is no directory"),
  ],
)
def test_errors_are_one_sentence(tmp_path, flags, message):
  done = _run("--source=text", "--input=x", "--tokenizer=x", f"--output={tmp_path / 'out'}", *flags)
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.startswith("error: ") and message in done.stderr
  assert done.stderr.count("\n") == 1
