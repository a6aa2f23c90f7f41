"""Mixtral 8x7B over text: LWM's five text stages from 32K to 1M tokens, for 256 TPU v5p chips.

Stages, datasets and learning rates are those of configs/lwm_text_7b.py. The devices that divide the
experts also divide the rows of a batch or, where there are few rows, exchange heads.
"""

from configs import lwm_text_7b, models
from lwm.config.experiment import Experiment
from lwm.parallel.sharding import MeshConfig

# Stage: expert, ring, ulysses.
_MESHES = {
  "32k": (8, 2, 1),
  "128k": (8, 8, 1),
  "256k": (8, 16, 1),
  "512k": (8, 32, 1),
  "1m": (1, 8, 8),
}


def get_config() -> Experiment:
  experiment = lwm_text_7b.get_config()
  experiment.name = "experts_mixtral_8x7b"
  experiment.init_from = "weights/mixtral_8x7b"
  experiment.tokenizer = "weights/mixtral_8x7b/tokenizer/tokenizer.model"
  experiment.model = models.mixtral_8x7b()
  for stage in experiment.stages:
    expert, ring, ulysses = _MESHES[stage.name]
    stage.mesh = MeshConfig(fsdp=-1, expert=expert, ring=ring, ulysses=ulysses)
  return experiment
