"""One process of test_distributed.py: joins the others, then does what ACTION says.

    python -m tests.lwm.parallel.joined_worker PROCESS NUM_PROCESSES TIMEOUT COORDINATOR ACTION

An empty PROCESS, NUM_PROCESSES or COORDINATOR is taken from the environment. Prints the number of
processes and the number of this one.
"""

import sys
import time

import jax

from lwm.errors import RESUME_EXIT_CODE, ResumeError, UserError
from lwm.parallel import distributed


def main(process, num_processes, start_timeout, coordinator, action):
  joined = distributed.joined(
    coordinator or None,
    int(num_processes) if num_processes else None,
    int(process) if process else None,
    peer_timeout=20,
    start_timeout=int(start_timeout),
  )
  with joined:
    print(jax.process_count(), jax.process_index(), flush=True)
    if action == "err":
      raise UserError("shard 3 is broken.")
    if action == "stop":
      raise ResumeError("stopped by SIGTERM.")
    if action == "wait":
      time.sleep(300)


if __name__ == "__main__":
  try:
    main(*sys.argv[1:])
  except ResumeError as error:
    print(error, file=sys.stderr)
    sys.exit(RESUME_EXIT_CODE)
  except UserError as error:
    sys.exit(f"error: {error}")
