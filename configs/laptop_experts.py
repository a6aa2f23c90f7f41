"""The laptop experiment with eight experts per layer, two of them for each token.

    make data
    python -m experiments.train --config=configs/laptop_experts.py --workdir=runs/laptop_experts

Each token uses as many FLOPs as in configs/laptop.py.
"""

from configs import laptop
from lwm.config.experiment import Experiment
from lwm.config.model import ExpertsConfig


def get_config() -> Experiment:
  experiment = laptop.get_config()
  experiment.name = "laptop_experts"
  width = experiment.model.feed_forward_width // 2
  experiment.model.experts = ExpertsConfig(num_experts=8, experts_per_token=2, width=width)
  return experiment
