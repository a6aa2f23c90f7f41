"""One process of test_input_wait.py: trains the first stage of tiny.py; process 1 reads slowly.

python -m tests.lwm.train.slow_input_worker EXPERIMENT.pickle WORKDIR PORT RANK
"""

import pathlib
import pickle
import sys
import time

# Longer than a step takes on a busy machine.
SECONDS = 1.0


def main(experiment_path, workdir, port, rank):
  import jax

  from lwm.data import Loader
  from lwm.report import input_wait
  from lwm.train import loop

  jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
  plain_iterate = Loader.iterate

  def slow_iterate(self, *range_):
    for batch in plain_iterate(self, *range_):
      time.sleep(SECONDS)
      yield batch

  if int(rank) == 1:
    Loader.iterate = slow_iterate
  input_wait.STEPS = 4
  loop.train(pickle.loads(pathlib.Path(experiment_path).read_bytes()), pathlib.Path(workdir))


if __name__ == "__main__":
  main(*sys.argv[1:])
