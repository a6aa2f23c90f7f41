"""Eight CPU devices in every test process, JAX's settings, and the option --quick."""

import gc
import os
import pathlib
import tempfile

# Another platform, such as cuda for tests/kernels/test_on_gpu.py, keeps its own settings.
IS_CPU = os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + IS_CPU * (
  " --xla_force_host_platform_device_count=8"
  # A device that waits 40 s for another one on a busy machine would end the process.
  + " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
  # Most programs run once. LLVM's optimisations, and an MLIR pipeline for each fusion, would take
  # more than half of the suite's time. The numbers are the same with XLA's older fusion emitters.
  + " --xla_cpu_parallel_codegen_split_count=1"
  + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  + " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
# Full collections would visit all objects of the libraries again and again.
gc.set_threshold(100_000, 20, 100)
# With fewer threads, all of them can wait in collectives: see lwm/parallel/xla_flags.py.
os.environ.setdefault("PJRT_NPROC", "128")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "lwm-test-jax-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Only programs with one device use the cache (tests/programs.py). With jaxlib 0.11.2, cached
# programs of several CPU devices have computed wrong gradients and waited forever in collectives.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Several test processes compile for TPUs at the same time; none of them runs on a TPU.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def pytest_addoption(parser):
  parser.addoption(
    "--quick", action="store_true", help="Run the first case of each test, and no slow tests."
  )


def pytest_collection_modifyitems(config, items):
  """With --quick, keeps one case of each parametrised test, so that every area keeps its tests."""
  if not config.getoption("--quick"):
    return
  kept, left_out, seen = [], [], set()
  for item in items:
    name = item.nodeid.partition("[")[0]
    is_needed = name not in seen and item.get_closest_marker("slow") is None
    (kept if is_needed else left_out).append(item)
    if is_needed:
      seen.add(name)
  items[:] = kept
  config.hook.pytest_deselected(items=left_out)
