"""Turns a dense checkpoint into one with experts that computes the same.

    python -m experiments.upcycle --input=runs/dense --output=weights/laptop_experts
    python -m experiments.train --config=configs/laptop_experts.py:upcycled --workdir=runs/upcycled

--input is the workdir of a run, or a checkpoint that experiments.import_weights wrote. Every expert
starts as a copy of the layer's feed-forward network, with the same width, so these layers use
--experts_per_token times as many FLOPs per token as before.

With --slices, each network is cut into so many parts first. The first of them become
--shared_experts, and each expert is a copy of one of the others. In this example, a token uses as
many FLOPs as before, but for the router:

    python -m experiments.upcycle --input=runs/dense --output=weights/laptop_sliced \\
        --slices=6 --shared_experts=4 --num_experts=32 --experts_per_token=2
"""

import pathlib

from absl import flags

from experiments import flags as experiment_flags
from lwm import convert
from lwm.checkpoint.reader import newest
from lwm.config.model import ROUTERS, ExpertsConfig
from lwm.errors import UserError

_INPUT = flags.DEFINE_string("input", None, "The dense model: a run's workdir or a checkpoint.")
_OUTPUT = flags.DEFINE_string("output", None, "The checkpoint to write, a new directory.")
_NUM_EXPERTS = flags.DEFINE_integer("num_experts", 8, "Experts per layer.", 1)
_PER_TOKEN = flags.DEFINE_integer("experts_per_token", 2, "Experts that a token uses.", 1)
_SLICES = flags.DEFINE_integer("slices", 1, "Parts that each dense network is cut into.", 1)
_SHARED = flags.DEFINE_integer(
  "shared_experts", 0, "Experts that every token goes through: the first slices.", 0
)
_ROUTER = flags.DEFINE_enum("router", ROUTERS[0], ROUTERS, "How experts are chosen.")
_NOISE = flags.DEFINE_float(
  "noise",
  0.0,
  "Standard deviation of the noise added to the copies, relative to that of the weights.",
  0.0,
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the routers and the noise.", 0)
flags.mark_flags_as_required(["input", "output"])


def main(argv: list[str]) -> None:
  del argv
  if not _INPUT.value or not _OUTPUT.value:
    raise UserError("--input and --output must not be empty.")
  if _PER_TOKEN.value > _NUM_EXPERTS.value:
    raise UserError(
      f"--experts_per_token={_PER_TOKEN.value} is more than --num_experts={_NUM_EXPERTS.value}."
    )
  experts = ExpertsConfig(
    _NUM_EXPERTS.value, _PER_TOKEN.value, shared_experts=_SHARED.value, router=_ROUTER.value
  )
  output = pathlib.Path(_OUTPUT.value)
  stored = newest(pathlib.Path(_INPUT.value))
  experiment = convert.upcycle(
    stored, output, experts, slices=_SLICES.value, noise=_NOISE.value, seed=_SEED.value
  )
  print(f"{stored.path} with config.model.experts={experiment.model.experts} is in {output}")


if __name__ == "__main__":
  experiment_flags.run(main)
