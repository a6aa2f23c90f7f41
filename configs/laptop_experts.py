"""The laptop experiment with 32 experts per layer, of which a token uses two, and four shared ones.

    make data
    python -m experiments.train --config=configs/laptop_experts.py --workdir=runs/laptop_experts

A token uses as many FLOPs as in configs/laptop.py, and 2% more for the router. The README compares
both after 640 steps of the third stage (`'--config.stages[2].steps=640'`). The variant `upcycled`
continues the training of the dense model in its last stage. Each layer has eight experts, which
start as copies of its dense network, and a token uses two of them. So these layers take twice the
FLOPs:

    python -m experiments.upcycle --input=runs/laptop --output=weights/laptop_experts
    python -m experiments.train --config=configs/laptop_experts.py:upcycled --workdir=runs/upcycled
"""

from typing import Literal

from configs import laptop
from lwm.config.experiment import Experiment
from lwm.config.model import ExpertsConfig


def get_config(variant: Literal["scratch", "upcycled"] = "scratch") -> Experiment:
  """The experiment, from scratch or from the dense model."""
  experiment = laptop.get_config()
  experiment.name = "laptop_experts"
  width = experiment.model.feed_forward_width
  experiment.model.experts = {
    # The shared experts are two thirds of the active width, so that most of it learns from every
    # token. Other divisions have been tried only with one seed each.
    "scratch": ExpertsConfig(32, 2, width=width // 6, shared_experts=4, scale=2.0),
    # As experiments.upcycle makes them.
    "upcycled": ExpertsConfig(8, 2, width=width),
  }[variant]
  if variant == "upcycled":
    experiment.init_from = "weights/laptop_experts"
    del experiment.stages[:-1]
  return experiment
