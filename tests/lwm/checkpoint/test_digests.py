"""Digests of a checkpoint's files."""

import json
import pathlib

import pytest

from lwm.checkpoint import digests


@pytest.fixture
def checkpoint(tmp_path) -> pathlib.Path:
  for name, content in {
    "params/manifest": b"abc",
    "params/_METADATA": b"{}",
    "params/ocdbt.process_0/d/1": bytes(1000),
    "params/commit_success.txt": b"",
    "params/ocdbt.process_1/d/2": b"another host",
    "progress/metadata": b"{}",
    "_CHECKPOINT_METADATA": b"{}",
  }.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  # What process 1 would have left.
  (tmp_path / "params" / "digests.process_1").write_text(
    '{"ocdbt.process_1/d/2": [12, 4109042033]}'
  )
  digests.write_own(tmp_path / "params")
  digests.write(tmp_path)
  return tmp_path


def test_each_file_is_in_once(checkpoint):
  written = json.loads((checkpoint / digests.FILE_NAME).read_text())
  assert sorted(written) == [
    "params/_METADATA",
    "params/manifest",
    "params/ocdbt.process_0/d/1",
    "params/ocdbt.process_1/d/2",
    "progress/metadata",
  ]
  assert written["params/ocdbt.process_0/d/1"][0] == 1000
  assert not list(checkpoint.glob("*/digests.*"))
  assert digests.damaged_file(checkpoint) is None


@pytest.mark.parametrize("damage", ("flip", "truncate", "lengthen", "remove"))
def test_damage_is_found(checkpoint, damage):
  path = checkpoint / "params/ocdbt.process_0/d/1"
  content = bytearray(path.read_bytes())
  if damage == "flip":
    content[500] ^= 1
  path.write_bytes({"truncate": content[:-1], "lengthen": content + b"0"}.get(damage, content))
  if damage == "remove":
    path.unlink()
  assert digests.damaged_file(checkpoint) == "params/ocdbt.process_0/d/1"


@pytest.mark.parametrize("content", ("", '{"params/manifest": [3', '{"params/manifest": 3}', "[]"))
def test_damaged_digests_are_damage(checkpoint, content):
  (checkpoint / digests.FILE_NAME).write_text(content)
  assert digests.damaged_file(checkpoint) == digests.FILE_NAME
