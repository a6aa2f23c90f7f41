"""LWM's five stages over text and video with 8 experts per layer, for 512 TPU v5p chips.

Two experts of LWM 7B's feed-forward width are chosen for each token. Stages, datasets and learning
rates are those of configs/lwm_vision_7b.py.
"""

from configs import lwm_vision_7b
from lwm.config.experiment import Experiment
from lwm.config.model import ExpertsConfig
from lwm.parallel.sharding import MeshConfig

# Ring of each stage; all devices of a ring have the same rows.
_RINGS = {"1k": 1, "8k": 1, "32k": 2, "128k": 8, "1m": 64}


def get_config() -> Experiment:
  experiment = lwm_vision_7b.get_config()
  experiment.name = "experts_lwm_vision_8x7b"
  experiment.init_from = ""
  model = experiment.model
  model.experts = ExpertsConfig(experts_per_token=2, width=model.feed_forward_width)
  for stage in experiment.stages:
    stage.mesh = MeshConfig(fsdp=-1, expert=8, ring=_RINGS[stage.name])
  return experiment
