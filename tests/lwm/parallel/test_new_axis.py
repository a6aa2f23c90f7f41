"""A mesh axis is added in lwm/parallel/sharding.py and nowhere else."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.lwm.parallel import new_axis_worker

CHECKOUT = pathlib.Path(__file__).parents[3]
# What a new axis that divides rows and stored parameters takes: text of sharding.py, and its
# replacement.
EDITS = (
  ("  fsdp: int = -1\n", "  fsdp: int = -1\n  pod: int = 1\n"),
  ('model: tuple[str, ...] = ("fsdp", ', 'model: tuple[str, ...] = ("fsdp", "pod", '),
  (
    'batch: tuple[str, ...] = ("data", "fsdp", ',
    'batch: tuple[str, ...] = ("data", "fsdp", "pod", ',
  ),
)
# The name of a mesh axis as a string.
AXIS = re.compile(r'"(data|fsdp|expert|ring|ulysses|tensor)"')


@pytest.mark.slow
def test_a_new_axis_trains_and_is_planned(tmp_path):
  for folder in ("kernels", "lwm"):
    shutil.copytree(
      CHECKOUT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
    )
  path = tmp_path / "lwm" / "parallel" / "sharding.py"
  text = path.read_text()
  for old, new in EDITS:
    assert text.count(old) == 1, old
    text = text.replace(old, new)
  path.write_text(text)
  process = subprocess.run(
    [sys.executable, new_axis_worker.__file__, "8", json.dumps(dict(fsdp=2, pod=2, ring=2))],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert process.returncode == 0, process.stderr
  added = json.loads(process.stdout)
  expected = new_axis_worker.losses(1, dict(fsdp=1))
  assert expected[-1] < expected[0]
  np.testing.assert_allclose(added["losses"], expected, rtol=1e-4)
  # It divides what fsdp divides.
  for name, count in new_axis_worker.counts(8, dict(fsdp=4, ring=2)).items():
    assert added[name] == count


def test_only_sharding_names_the_mesh_axes():
  """Also not in a docstring. MeshConfig(...) names its fields without quotation marks."""
  named = [
    f"{path.relative_to(CHECKOUT)}:{number}"
    for folder in ("lwm", "configs")
    for path in sorted((CHECKOUT / folder).rglob("*.py"))
    for number, line in enumerate(path.read_text().splitlines(), start=1)
    if AXIS.search(line) and path.name != "sharding.py"
  ]
  assert not named
