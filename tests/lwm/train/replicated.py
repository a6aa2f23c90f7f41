"""The first stage of tiny.py on eight devices, with experts whose copies change in every step.

--config=tests/lwm/train/replicated.py:DIRECTORY    # with tokenizer.model, text and video
"""

import pathlib
import runpy

from lwm.config.experiment import Experiment, OptimizerConfig
from lwm.config.model import ExpertsConfig
from lwm.parallel.sharding import MeshConfig


def get_config(directory: str) -> Experiment:
  tiny = runpy.run_path(str(pathlib.Path(__file__).with_name("tiny.py")))
  experiment = tiny["get_config"](directory)
  experiment.name = "replicated"
  experiment.model.num_layers = 1
  experiment.model.experts = ExpertsConfig(16, 2, width=16, placement="replicate", load_decay=0.2)
  # Adam would turn the smallest differences into full steps.
  experiment.optimizer = OptimizerConfig(peak_learning_rate=0.1, epsilon=1.0)
  del experiment.stages[1:]
  experiment.stages[0].mesh = MeshConfig(fsdp=1, expert=8)
  experiment.checkpoint.every_steps = 3
  experiment.checkpoint.keep = 9
  return experiment
