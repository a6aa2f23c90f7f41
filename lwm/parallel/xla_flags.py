"""XLA's flags, by platform, each with the reason why it is set.

The compilers of jax 0.11.2 and libtpu 0.0.48 overlap communication with computation by default:
most flags in recipes for older versions now have no effect. libtpu's flags for data-parallel sums
and for the network between slices did not change small training steps over two slices. The flags
here change a program when they are set the other way, or keep a run alive.
Left out on purpose: xla_gpu_enable_while_loop_double_buffering, which makes a step of a small model
on eight H100 use a quarter more memory for temporaries.
"""

import os

import jax

# XLA_FLAGS: for the compilers in jaxlib and its GPU plugins.
XLA = {
  # GPU. This is the default; without it no hop of the ring overlaps with computation.
  "xla_gpu_enable_latency_hiding_scheduler": "true",
  # GPU. By default, XLA stacks what a kernel returns for the backward pass by running the kernel
  # again within a fusion: each layer would compute its attention twice in the forward pass.
  "xla_gpu_enable_dynamic_slice_fusion": "false",
  # CPU. By default, a program in which one device waits 40 s for another is killed. On a busy
  # machine such a wait is no error, and lwm/parallel/distributed.py detects lost processes.
  "xla_cpu_collective_call_terminate_timeout_seconds": "1200",
}

# LIBTPU_INIT_ARGS.
TPU = {
  # These two are the defaults. Without either, the gathers of weights along `fsdp` are scheduled
  # differently: setting them here makes us notice a version that changes them.
  "xla_tpu_enable_latency_hiding_scheduler": "true",
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
  # By default, nothing is computed while tokens travel to experts and back.
  "xla_tpu_enable_async_ragged_all_to_all": "true",
}

# PJRT_NPROC: threads of the CPU client. A device that waits in a collective occupies a thread, and
# the gathers of a layer's weights wait concurrently. Several CPU devices get one thread per device
# by default: then all threads can wait forever, each in another collective. Several processes must
# keep the default: they communicate over gloo, which would run concurrently what must run in order.
CPU_THREADS = 128

# XLA_CLIENT_MEM_FRACTION: JAX's share of a GPU's memory. The default is three quarters, and a step
# that needs more fails. What remains is for CUDA and NCCL.
GPU_MEMORY = 0.95


def apply(num_processes: int | None = None) -> None:
  """Puts the flags into the environment; flags that it already contains keep their values.

  Call this before anything asks for devices: the compilers read the flags once.

  Args:
    num_processes: processes that train together; JAX_NUM_PROCESSES if None.
  """
  for variable, flags in (("XLA_FLAGS", XLA), ("LIBTPU_INIT_ARGS", TPU)):
    given = os.environ.get(variable, "")
    ours = [f"--{name}={value}" for name, value in flags.items() if f"--{name}=" not in given]
    os.environ[variable] = " ".join([*ours, given]).strip()
  # JAX refuses to start when both this variable and its older name are set.
  if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_MEMORY))
  alone = num_processes is None and "JAX_NUM_PROCESSES" not in os.environ
  several_cpus = (
    "--xla_force_host_platform_device_count=" in os.environ["XLA_FLAGS"]
    or jax.config.jax_num_cpu_devices > 1
  )
  if alone and several_cpus:
    os.environ.setdefault("PJRT_NPROC", str(CPU_THREADS))
