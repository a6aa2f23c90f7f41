"""The laptop experiment with 16 experts per layer, of which a token uses four, and two shared ones.

    make data
    python -m experiments.train --config=configs/laptop_experts.py --workdir=runs/laptop_experts

A token uses as many FLOPs as in configs/laptop.py, and 1% more for the router. The README compares
both. The variant `upcycled` continues the training of the dense model in its last stage. Each layer
has eight experts, which start as copies of its dense network, and a token uses two of them. So
these layers take twice the FLOPs:

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
    # An expert sees a quarter of the tokens. With two of 32 experts and four shared ones, where it
    # sees a sixteenth, the model learnt to copy codes from the frame before more slowly: after 500
    # and after 860 steps with film, it was ahead of the dense one on text and behind on vision.
    "scratch": ExpertsConfig(16, 4, width=width // 6, shared_experts=2, scale=4.0),
    # As experiments.upcycle makes them.
    "upcycled": ExpertsConfig(8, 2, width=width),
  }[variant]
  if variant == "upcycled":
    experiment.init_from = "weights/laptop_experts"
    del experiment.stages[:-1]
  return experiment
