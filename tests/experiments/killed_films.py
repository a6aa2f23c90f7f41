"""Kills `experiments.tokenize_video` at random moments and compares the dataset with another one.

    python -m tests.experiments.killed_films --kills=20 --input=films/ --vqgan=vqgan.npz \\
        --tokenizer=tokenizer.model --output=killed
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from absl import app, flags

ROOT = pathlib.Path(__file__).parents[2]
_KILLS = flags.DEFINE_integer("kills", 20, "Number of kills.")


def start(*arguments: str) -> subprocess.Popen:
  environment = {
    name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_NPROC")
  }
  return subprocess.Popen(
    [sys.executable, "-m", *arguments],
    cwd=ROOT,
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def run(*arguments: str) -> str:
  process = start(*arguments)
  output, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors
  return output


def files(dataset: pathlib.Path) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in dataset.iterdir()}


def unfinished(dataset: pathlib.Path) -> list[str]:
  """What a killed command has left beside the dataset."""
  return [path.name for path in dataset.parent.glob(f".{dataset.name}.*")]


def kill(command: list[str], output: pathlib.Path, kills: int, seconds: float) -> None:
  """Kills the command `kills` times, then lets it end.

  Each kill comes at a random moment of the first `seconds`, or sooner if the command has ended
  sooner before. A dataset that is complete is removed, so that every kill hits work.
  """
  generator = random.Random(0)
  killed = 0
  while killed < kills:
    shutil.rmtree(output, ignore_errors=True)
    begin = time.monotonic()
    process = start(*command)
    try:
      process.wait(generator.uniform(0, seconds))
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      killed += 1
    else:
      seconds = time.monotonic() - begin
    process.communicate()
    parts = len(list(output.parent.glob(f".{output.name}.unfinished/part-??????")))
    print(f"kill {killed}: {parts} parts, complete: {output.exists()}", flush=True)
  if not output.exists():
    run(*command)


def main(argv: list[str]) -> None:
  output = pathlib.Path(next(a for a in argv if a.startswith("--output=")).partition("=")[2])
  others = [argument for argument in argv[1:] if not argument.startswith("--output=")]
  command = ["experiments.tokenize_video", *others]
  whole = output.with_name(output.name + "-whole")
  begin = time.monotonic()
  run(*command, f"--output={whole}")
  seconds = time.monotonic() - begin
  kill([*command, f"--output={output}"], output, _KILLS.value, seconds)
  print("the same bytes:", files(output) == files(whole), "left:", unfinished(output))


if __name__ == "__main__":
  app.run(main, flags_parser=lambda argv: flags.FLAGS(argv, known_only=True))
