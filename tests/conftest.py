"""Eight CPU devices in every test process, and JAX's compilation cache."""

import os
import pathlib
import tempfile

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  # With this scheduler, jaxlib 0.11.2 computes wrong gradients of a ring with a cached program.
  + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
# With fewer threads, all of them can wait in collectives: see lwm/parallel/xla_flags.py.
os.environ.setdefault("PJRT_NPROC", "128")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "lwm-test-jax-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Several test processes compile for TPUs at the same time; none of them runs on a TPU.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
