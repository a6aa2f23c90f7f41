"""Flags of XLA, by platform, each with the reason why it is set.

The compilers of jax 0.11.2 and libtpu 0.0.48 hide communication behind computation by themselves:
most flags that recipes for older versions pass are their defaults. Those of libtpu for
data-parallel sums and for the network between slices left small training steps over two slices as
they were. What is here changes a program when it is set the other way, or keeps a run alive.
"""

import os

# XLA_FLAGS: of the compilers in jaxlib and its GPU plugins.
XLA = {
    # GPU. A step is a loop over layers: two of them in its body let the weights of the next one be
    # gathered, and keys and values travel, while one computes; no copies from pass to pass.
    "xla_gpu_enable_while_loop_double_buffering": "true",
    # CPU. A program in which one device waits 40 s for another is killed. On a busy machine that is
    # no error; and whether a process is lost is for lwm/parallel/distributed.py to say.
    "xla_cpu_collective_call_terminate_timeout_seconds": "1200",
}

# LIBTPU_INIT_ARGS. Defaults, stated because the gathers of weights along `fsdp` wait in the open
# without either: a version that changes them is to be noticed.
TPU = {
    "xla_tpu_enable_latency_hiding_scheduler": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}


def apply() -> None:
  """Puts the flags into the environment, but for those that it already has.

  Must come before the first question about devices: the compilers read them once.
  """
  for variable, flags in (("XLA_FLAGS", XLA), ("LIBTPU_INIT_ARGS", TPU)):
    given = os.environ.get(variable, "")
    ours = [f"--{name}={value}" for name, value in flags.items() if f"--{name}=" not in given]
    os.environ[variable] = " ".join([*ours, given]).strip()
