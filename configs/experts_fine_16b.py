"""DeepSeekMoE 16B over text: 64 small experts, LWM's five text stages, for 256 TPU v5p chips.

Six of the experts are chosen for each token, by biases that follow the loads, and two are shared.
The run starts from random parameters. Stages, datasets and learning rates are those of
configs/lwm_text_7b.py; prepare the datasets with the tokenizer that you name.
"""

from configs import lwm_text_7b, models
from lwm.config.experiment import Experiment
from lwm.parallel.sharding import MeshConfig

# Stage: expert, ring, ulysses.
_MESHES = {
  "32k": (16, 2, 1),
  "128k": (16, 8, 1),
  "256k": (16, 16, 1),
  "512k": (8, 8, 4),
  "1m": (4, 8, 8),
}


def get_config() -> Experiment:
  experiment = lwm_text_7b.get_config()
  experiment.name = "experts_fine_16b"
  experiment.init_from = ""
  experiment.tokenizer = "weights/deepseek_16b/tokenizer/tokenizer.json"
  experiment.model = models.fine_grained_16b()
  for stage in experiment.stages:
    expert, ring, ulysses = _MESHES[stage.name]
    stage.mesh = MeshConfig(fsdp=-1, expert=expert, ring=ring, ulysses=ulysses)
  return experiment
