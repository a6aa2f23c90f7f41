"""One process of test_processes.py: hashes its shards of a batch stream into a JSON file.

python -m tests.lwm.data.stream_worker PICKLE OUT.json NUM_DEVICES PORT NUM_PROCESSES RANK START
"""

import hashlib
import json
import os
import pathlib
import pickle
import sys


def main(experiment_path, out, num_devices, port, num_processes, rank, start_step):
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"
  import jax
  import numpy as np

  from lwm.data import Loader
  from lwm.data.dataset import Split
  from lwm.parallel.mesh import make_mesh
  from lwm.parallel.sharding import MeshConfig

  if int(num_processes) > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(num_processes), int(rank))
  assert len(jax.devices()) == 8 and len(jax.local_devices()) == int(num_devices)

  read = []
  plain_read = Split.read

  def counting_read(self, document, start, stop):
    read.append(stop - start)
    return plain_read(self, document, start, stop)

  Split.read = counting_read
  result = {}
  experiment = pickle.loads(pathlib.Path(experiment_path).read_bytes())
  meshes = {
    "rows": MeshConfig(data=4, fsdp=1, ring=2),
    "ring": MeshConfig(fsdp=1, ring=8),
    "both": MeshConfig(fsdp=2, ring=2, tensor=2),
  }
  for name, config in meshes.items():
    mesh = make_mesh(config)
    read.clear()
    hashes = {}
    batches = Loader(experiment, 0, mesh).iterate(int(start_step))
    for step, batch in enumerate(batches, int(start_step)):
      for field, array in batch.items():
        for shard in array.addressable_shards:
          place = [part.indices(size)[:2] for part, size in zip(shard.index, array.shape)]
          content = np.asarray(shard.data)
          digest = hashlib.sha256(content.tobytes()).hexdigest()
          hashes[f"{step} {field} {place} {content.dtype} {content.shape}"] = digest
    result[name] = {"hashes": hashes, "tokens_read": int(sum(read))}
  pathlib.Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
  main(*sys.argv[1:])
