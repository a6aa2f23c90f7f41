"""The first stage of tiny.py, shorter and on one layer: what two processes train in the tests.

--config=tests/lwm/train/pair.py:DIRECTORY    # with tokenizer.model, text and video
"""

import pathlib
import runpy

from lwm.config.experiment import Experiment

STEPS = 14


def get_config(directory: str) -> Experiment:
  tiny = runpy.run_path(str(pathlib.Path(__file__).with_name("tiny.py")))
  experiment = tiny["get_config"](directory)
  experiment.name = "pair"
  experiment.model.num_layers = 1
  del experiment.stages[1:]
  experiment.stages[0].steps = STEPS
  experiment.checkpoint.keep = 4
  return experiment
