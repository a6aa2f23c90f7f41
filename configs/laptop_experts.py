"""A model of text and games with 16 experts per layer, of which a token uses four, and two shared.

    make data
    .venv/bin/pip install --constraint pins.txt --editable '.[games]'
    python -m experiments.games_data
    python -m experiments.train --config=configs/laptop_experts.py --workdir=runs/experts

The stages are those of configs/laptop.py. Its films show three scenes; these show thirty games, so
there is more to know. `dense` is the same experiment with the laptop's dense model. A token uses as
many FLOPs in both, and 1% more for the router. The README compares them:

    python -m experiments.train --config=configs/laptop_experts.py:dense --workdir=runs/dense

`upcycled` continues the training of that dense model in its last stage. Each layer has eight
experts, which start as copies of its dense network, and a token uses two of them. So these layers
take twice the FLOPs:

    python -m experiments.upcycle --input=runs/dense --output=weights/laptop_experts
    python -m experiments.train --config=configs/laptop_experts.py:upcycled --workdir=runs/upcycled
"""

from typing import Literal

from configs import laptop
from lwm.config.experiment import Experiment
from lwm.config.model import ExpertsConfig


def get_config(variant: Literal["scratch", "dense", "upcycled"] = "scratch") -> Experiment:
  """The experiment with experts from scratch, without experts, or from the dense model."""
  experiment = laptop.get_config()
  experiment.name = "laptop_experts"
  (_, video) = experiment.datasets
  video.path = "data/laptop/games"
  width = experiment.model.feed_forward_width
  if variant == "scratch":
    experiment.model.experts = ExpertsConfig(16, 4, width=width // 6, shared_experts=2, scale=4.0)
  if variant == "upcycled":
    # As experiments.upcycle makes them.
    experiment.model.experts = ExpertsConfig(8, 2, width=width)
    experiment.init_from = "weights/laptop_experts"
    del experiment.stages[:-1]
  return experiment
