"""XLA's flags: the compilers of these versions know each one, and the user's own come first."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxlib import xla_client

from lwm.cost.chips import of_kind
from lwm.parallel import xla_flags
from lwm.plan import load
from tests.kernels.compile_for_tpu import not_cached

# Sets the flags after `import jax`, as experiments/train.py does.
PROGRAM = """
import jax
from lwm.parallel import xla_flags
xla_flags.apply()
print(jax.numpy.ones(3).sum())
"""


@pytest.mark.parametrize("flag", xla_flags.TPU)
def test_libtpu_knows_the_flag(flag):
  device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
  argument = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=SingleDeviceSharding(device))
  lowered = jax.jit(jnp.tanh).lower(argument)
  with not_cached():
    lowered.compile(compiler_options={flag: xla_flags.TPU[flag]})
  with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
    lowered.compile(compiler_options={f"{flag}_": xla_flags.TPU[flag]})


def run(**variables):
  return subprocess.run(
    [sys.executable, "-c", PROGRAM],
    env=os.environ | variables,
    text=True,
    capture_output=True,
    timeout=300,
  )


def test_jaxlib_knows_the_flags():
  assert run(XLA_FLAGS="").stdout == "3.0\n"
  process = run(XLA_FLAGS="--xla_gpu_no_such_flag=true")
  assert process.returncode != 0 and "xla_gpu_no_such_flag" in process.stderr


def test_what_the_environment_says_stays(monkeypatch):
  given = "--xla_tpu_enable_latency_hiding_scheduler=false --other=1"
  monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
  monkeypatch.setenv("XLA_FLAGS", "")
  xla_flags.apply()
  assert os.environ["LIBTPU_INIT_ARGS"] == (
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    f"--xla_tpu_enable_async_ragged_all_to_all=true {given}"
  )
  assert os.environ["XLA_FLAGS"].split() == [f"--{k}={v}" for k, v in xla_flags.XLA.items()]


FRACTIONS = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.mark.parametrize("given", (None, *FRACTIONS))
def test_gpus_give_jax_the_memory_that_the_planner_counts_on(monkeypatch, given):
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
  for name in FRACTIONS:
    # monkeypatch then also removes, when the test ends, what `apply` sets.
    monkeypatch.setenv(name, "0.5")
    if name != given:
      monkeypatch.delenv(name)
  xla_flags.apply()
  granted = xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"]
  assert granted == (0.5 if given else xla_flags.GPU_MEMORY)
  machine = load("a100:1x8")
  assert machine.chip.memory == int(xla_flags.GPU_MEMORY * of_kind("NVIDIA A100").memory)


EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.mark.parametrize(
  "given, num_processes, threads",
  [("", None, None), (EIGHT, None, str(xla_flags.CPU_THREADS)), (EIGHT, 2, None)],
)
def test_several_cpu_devices_get_threads_to_wait_in(monkeypatch, given, num_processes, threads):
  monkeypatch.setenv("XLA_FLAGS", given)
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
  monkeypatch.delenv("PJRT_NPROC", raising=False)
  xla_flags.apply(num_processes)
  assert os.environ.pop("PJRT_NPROC", None) == threads


def test_several_cpu_devices_by_the_setting_of_jax_get_threads_too():
  program = (
    "import os\nfrom lwm.parallel import xla_flags\n"
    "xla_flags.apply()\nprint(os.environ['PJRT_NPROC'])"
  )
  environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=environment | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "8"},
    text=True,
    capture_output=True,
    timeout=300,
  )
  assert done.stdout == f"{xla_flags.CPU_THREADS}\n", done.stderr
