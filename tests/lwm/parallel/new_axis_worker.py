"""Four train steps of a tiny model: new_axis_worker.py NUM_DEVICES MESH, MESH as JSON.

Prints as JSON the losses and what the planner counts. PYTHONPATH says which code it imports.
"""

import json
import sys

import jax
import numpy as np

from lwm.config.batch import FIELDS
from lwm.config.experiment import Experiment, OptimizerConfig, Stage
from lwm.config.model import ModelConfig
from lwm.config.validate import check_devices
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig
from lwm.plan import load
from lwm.plan.bound import least_memory
from lwm.plan.traffic import step_traffic
from lwm.program.stage import build_program

ROWS, LENGTH = 8, 64


def planned(mesh: dict[str, int]) -> tuple[Experiment, Stage]:
  stage = Stage(
    sequence_length=LENGTH,
    tokens_per_batch=ROWS * LENGTH,
    steps=4,
    warmup_steps=0,
    accumulation_steps=2,
    mesh=MeshConfig(**mesh),
  )
  experiment = Experiment(
    model=ModelConfig(vision_vocab_size=64, compute_dtype="float32", initializer_std=0.2),
    optimizer=OptimizerConfig(peak_learning_rate=1e-2),
    stages=[stage],
  )
  return experiment, stage


def losses(num_devices: int, mesh: dict[str, int]) -> list[float]:
  experiment, stage = planned(mesh)
  check_devices(experiment, num_devices)
  program = build_program(experiment, stage, jax.devices()[:num_devices])
  order_S = program.objective.layout.permutation(LENGTH)
  found = []
  with jax.set_mesh(program.mesh):
    state = program.fresh_state(program.initial_params(seed=0))
    for seed in range(stage.steps):
      batch = random_batch(np.random.default_rng(seed), experiment.model)
      batch = {
        name: jax.device_put(array_BxS[:, order_S], program.batch[name].sharding)
        for name, array_BxS in batch.items()
      }
      state, metrics = program.train_step(state, batch)
      found.append(float(metrics["loss"]))
  return found


def counts(num_devices: int, mesh: dict[str, int]) -> dict[str, float]:
  """Bytes of memory and bytes sent, as the planner counts them."""
  experiment, stage = planned(mesh)
  topology = load(f"cpu:{num_devices}")
  devices = make_mesh(stage.mesh, topology.devices)
  return {
    "least_memory": least_memory(experiment, stage, devices.shape),
    "sent": sum(t.bytes for t in step_traffic(experiment, stage, devices, topology)),
  }


def random_batch(rng: np.random.Generator, model: ModelConfig) -> dict[str, np.ndarray]:
  """Two documents per row, in global order."""
  column_S = np.arange(LENGTH)
  start_S = np.where(column_S < 24, 0, 24)
  targets_BxS = rng.integers(0, model.vocab_size, (ROWS, LENGTH))
  fields = {
    "tokens": rng.integers(0, model.vocab_size, (ROWS, LENGTH)),
    "targets": targets_BxS,
    "loss_weights": np.ones((ROWS, LENGTH)),
    "positions": column_S - start_S,
    "modality": targets_BxS >= model.text_vocab_size,
    "key_start": start_S,
    "key_stop": column_S + 1,
  }
  return {
    name: np.broadcast_to(fields[name], (ROWS, LENGTH)).astype(dtype)
    for name, dtype in FIELDS.items()
  }


if __name__ == "__main__":
  arguments = int(sys.argv[1]), json.loads(sys.argv[2])
  print(json.dumps({"losses": losses(*arguments)} | counts(*arguments)))
