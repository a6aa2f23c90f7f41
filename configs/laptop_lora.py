"""LoRA on a finished laptop run and text of your own, in a minute on two CPU cores.

    python -m experiments.prepare_data --source=text --input=FOLDER --output=data/mine \\
        --tokenizer=data/laptop/tokenizer.model --validation_fraction=0.1
    python -m experiments.train --config=configs/laptop_lora.py --workdir=runs/laptop_lora

It trains 1.1% of the parameters. Its stage has the RoPE theta of the last stage of
configs/laptop.py, whose model it starts from.
"""

from configs import laptop
from lwm.config.experiment import DatasetConfig, Experiment, MixtureEntry, Stage
from lwm.config.model import LoraConfig


def get_config() -> Experiment:
  experiment = laptop.get_config()
  theta = experiment.stages[-1].rope_theta
  experiment.name = "laptop_lora"
  experiment.init_from = "runs/laptop"
  experiment.model.lora = LoraConfig(rank=4, alpha=8)
  experiment.datasets = [DatasetConfig(name="mine", path="data/mine")]
  experiment.stages = [
    Stage(
      name="lora",
      sequence_length=512,
      rope_theta=theta,
      tokens_per_batch=4096,
      steps=80,
      warmup_steps=5,
      mixture=[MixtureEntry("mine")],
    )
  ]
  experiment.evaluation.every_steps = 40
  return experiment
