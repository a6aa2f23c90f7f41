"""The laptop experiment with 16 experts per layer, of which a token uses two, and a shared one.

    make data
    python -m experiments.train --config=configs/laptop_experts.py --workdir=runs/laptop_experts

A token uses as many FLOPs as in configs/laptop.py. The variant `upcycled` continues the training of
the dense model in its last stage. Each layer has eight experts, which start as copies of its dense
network, and a token uses two of them. So these layers take twice the FLOPs:

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
    # A shared expert and a scale equal to the experts per token learn faster here than 8 experts of
    # half the width: 3.85 instead of 3.86 nats after text_512 (dense: 3.88).
    "scratch": ExpertsConfig(16, 2, width=width // 3, shared_experts=1, scale=2.0),
    # As experiments.upcycle makes them.
    "upcycled": ExpertsConfig(8, 2, width=width),
  }[variant]
  if variant == "upcycled":
    experiment.init_from = "weights/laptop_experts"
    del experiment.stages[:-1]
  return experiment
