"""Flags of XLA, by platform, each with the reason why it is set.

The compilers of jax 0.11.2 and libtpu 0.0.48 hide communication behind computation by themselves:
most flags that recipes for older versions pass are their defaults. Those of libtpu for
data-parallel sums and for the network between slices left small training steps over two slices as
they were. What is here changes a program when it is set the other way, or keeps a run alive.
Left out on purpose: xla_gpu_enable_while_loop_double_buffering, with which a step of a small model
on eight H100 takes a quarter more memory for temporaries.
"""

import os

# XLA_FLAGS: of the compilers in jaxlib and its GPU plugins.
XLA = {
  # GPU. A default, stated because without it no hop of the ring hides behind a computation.
  "xla_gpu_enable_latency_hiding_scheduler": "true",
  # CPU. A program in which one device waits 40 s for another is killed. On a busy machine that is
  # no error; and whether a process is lost is for lwm/parallel/distributed.py to say.
  "xla_cpu_collective_call_terminate_timeout_seconds": "1200",
}

# LIBTPU_INIT_ARGS. Defaults, stated because without either the gathers of weights along `fsdp` are
# scheduled in another way: a version that changes them is to be noticed.
TPU = {
  "xla_tpu_enable_latency_hiding_scheduler": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}

# PJRT_NPROC: threads of the client for CPUs. A device that waits in a collective holds one, and the
# gathers of a layer's weights wait side by side: of one a device, which is what several CPU devices
# get by default, all may wait, each for another collective, for ever. Several processes, which meet
# over gloo, must not have them: it takes side by side what comes in turn.
CPU_THREADS = 128

# XLA_CLIENT_MEM_FRACTION: JAX's share of a GPU's memory. Of its own accord it takes three quarters,
# and a step that needs more does not run; the rest is for CUDA and NCCL.
GPU_MEMORY = 0.95


def apply(num_processes: int | None = None) -> None:
  """Puts the flags into the environment, but for those that it already has.

  Must come before the first question about devices: the compilers read them once.

  Args:
    num_processes: that train together, if it was said; or else JAX_NUM_PROCESSES.
  """
  for variable, flags in (("XLA_FLAGS", XLA), ("LIBTPU_INIT_ARGS", TPU)):
    given = os.environ.get(variable, "")
    ours = [f"--{name}={value}" for name, value in flags.items() if f"--{name}=" not in given]
    os.environ[variable] = " ".join([*ours, given]).strip()
  # JAX refuses both its name and the older one.
  if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_MEMORY))
  alone = num_processes is None and "JAX_NUM_PROCESSES" not in os.environ
  if alone and "--xla_force_host_platform_device_count=" in os.environ["XLA_FLAGS"]:
    os.environ.setdefault("PJRT_NPROC", str(CPU_THREADS))
