"""Memory and speed of a long prompt and its answer, on a machine that you don't need to have.

    python -m experiments.plan_inference --config=configs/lwm_text_7b.py --topology=v5p:2x2x2
    python -m experiments.plan_inference --config=configs/lwm_text_7b.py --topology=h200:1x8 \\
        --mesh.ring=4 --mesh.tensor=2 --context=1048576 --cache=int8

Compiles the programs of experiments.generate and experiments.chat ahead of time: prefill, which
reads a chunk of a prompt, and decode. Weights are bfloat16. Memory is XLA's figure, and speed is a
roofline (lwm/infer/roofline.py). By default, all devices form one ring.
"""

import os

import jax
from absl import flags

from experiments import flags as experiment_flags
from lwm import infer
from lwm.config.experiment import Experiment
from lwm.config.validate import check_model_fits_mesh, validate
from lwm.cost.chips import GIB
from lwm.errors import UserError
from lwm.infer.ahead import trace
from lwm.infer.roofline import Phase, assumptions, estimate_decode, estimate_prefill
from lwm.parallel import xla_flags
from lwm.parallel.mesh import make_mesh
from lwm.parallel.sharding import MeshConfig, ShardingRules
from lwm.plan import compile_program, load
from lwm.plan.memory import shard_bytes

_CONFIG = experiment_flags.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "The machine: v5p:2x2x2.", required=True)
_MESH = MeshConfig(fsdp=1, ring=-1)
experiment_flags.define_settings("mesh", _MESH)
_CONTEXT = flags.DEFINE_integer("context", 1 << 20, "Tokens per prompt and answer.", lower_bound=1)
_CHUNK = flags.DEFINE_integer(
  "chunk", 16384, "Prompt tokens that the model reads at a time.", lower_bound=1
)
_ROWS = flags.DEFINE_integer("rows", 1, "Prompts in the cache.", lower_bound=1)
_CACHE = flags.DEFINE_enum("cache", "dense", infer.CACHE_FORMS, "The form of the cache.")


def main(argv: list[str]) -> None:
  del argv
  experiment = _CONFIG.value
  if not isinstance(experiment, Experiment):
    raise UserError("Only language models generate: name the config of one with --config.")
  validate(experiment)
  model, topology = experiment.model, load(_TOPOLOGY.value or "")
  mesh = make_mesh(_MESH, topology.devices)
  check_model_fits_mesh(model, mesh.shape, ShardingRules.inference(few_tokens=False))
  programs = trace(
    model,
    mesh,
    context=_CONTEXT.value or 1,
    chunk=_CHUNK.value or 1,
    num_rows=_ROWS.value or 1,
    cache=_CACHE.value or "dense",
    rope_theta=experiment.stages[-1].rope_theta,
  )
  prefill, decode = (
    estimate(model, mesh, topology, programs) for estimate in (estimate_prefill, estimate_decode)
  )
  sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
  print(f"{topology.name}: {sizes or 'one device'}; {programs.context:,} tokens, per device:")
  print(f"  weights  {shard_bytes(programs.params) / GIB:6.2f} GiB")
  print(f"  cache    {shard_bytes(programs.cache) / GIB:6.2f} GiB", flush=True)
  for name, program in (("prefill", programs.prefill), ("decode", programs.decode)):
    with jax.set_mesh(mesh):
      lowered = program.lower()
    memory, compilation = compile_program(lowered, topology, programs.params)
    fits = "fits" if memory.fits else "DOES NOT FIT"
    print(
      f"  {name:8} {memory.total / GIB:6.2f} of {memory.capacity / GIB:.1f} GiB: {fits}; "
      f"{memory.temporaries / GIB:.2f} GiB of temporaries; compiled in {compilation.seconds:.0f} s",
      flush=True,
    )
  print("estimated:")
  rows, tokens = programs.num_rows, programs.num_rows * programs.context
  print(
    f"  prefill  {prefill.total:8.4g} s, {tokens / prefill.total:,.0f} tokens/s: {_parts(prefill)}"
  )
  print(f"  decode   {decode.total:8.4g} s, {rows / decode.total:,.1f} tokens/s: {_parts(decode)}")
  print(f"  the first token after {prefill.total + decode.total:.4g} s")
  print("assumptions:")
  for sentence in assumptions(topology.chip):
    print(f"  {sentence}")


def _parts(phase: Phase) -> str:
  """The time, memory traffic and communication of a phase, as text."""
  parts = [f"{name} {seconds:.3g} s" for name, seconds in phase.seconds.items() if seconds]
  return (
    f"{', '.join(parts)}; a device reads {phase.bytes / GIB:,.4g} GiB and sends "
    f"{phase.sent / GIB:,.3g} GiB in {phase.collectives:,} collectives"
  )


if __name__ == "__main__":
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  xla_flags.apply()
  # Only compilers are needed: a TPU or GPU of this machine stays free for others.
  jax.config.update("jax_platforms", "cpu")
  experiment_flags.run(main)
