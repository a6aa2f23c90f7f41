"""XLA's description of a GPU to compile for (stream_executor.GpuTargetConfigProto, as text).

The figures come from openxla/xla, xla/backends/gpu/target_config/specs.
"""

import dataclasses

from lwm.cost.chips import of_kind


@dataclasses.dataclass(frozen=True)
class _Gpu:
  kind: str
  capability: int
  cores: int
  shared_memory: int  # Bytes per core; a block may use 1024 bytes less.
  l2_cache: int
  clock_ghz: float
  fpus_per_core: int = 128


GPUS = {
  "a100": _Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 167936, 41943040, 1.41, 64),
  "h100": _Gpu("NVIDIA H100 80GB HBM3", 9, 132, 233472, 52428800, 1.98),
  "h200": _Gpu("NVIDIA H200", 9, 132, 233472, 52428800, 1.98),
  "b200": _Gpu("NVIDIA B200", 10, 148, 233472, 132644864, 1.965),
}


def gpu_target(name: str) -> str:
  """The text proto that `jax.experimental.topologies` takes as `target_config`."""
  gpu = GPUS[name]
  chip = of_kind(gpu.kind)
  assert chip is not None
  features = "NONE" if gpu.capability < 9 else "ACCELERATED_FEATURES"
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.memory_bandwidth)}
  l2_cache_size: {gpu.l2_cache}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {chip.memory}
  shared_memory_per_block_optin: {gpu.shared_memory - 1024}
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: {features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.kind}"
"""
