"""`python -m experiments.prepare_data` on a folder of odd files: nothing happens in silence."""

import gzip
import json
import os
import pathlib

import pyarrow
import pytest

from lwm.data import Dataset
from tests import programs

LINE = b'{"text": "the quick brown fox", "url": "a.example"}\n'
MANY = b"".join(b'{"text": "line %d of many, %d"}\n' % (i, i * 7919) for i in range(9000))


def zstd(content: bytes) -> bytes:
  return pyarrow.compress(content, codec="zstd", asbytes=True)


# Name, content, and what becomes of it: the number of documents, and the beginning of the reason of
# each bad record, by its place in the file ("" for the file).
ODD_FILES = [
  ("plain.jsonl", LINE * 2, 2, {}),
  ("byte_order_mark.jsonl", b"\xef\xbb\xbf" + LINE * 2, 2, {}),
  ("joined_with_byte_order_marks.jsonl", (b"\xef\xbb\xbf" + LINE) * 2, 2, {}),
  ("utf16.jsonl", LINE.decode().encode("utf-16"), 0, {"": "cannot be read: it looks like UTF-16"}),
  ("utf16_big.jsonl", b"\xfe\xff\x00{", 0, {"": "cannot be read: it looks like UTF-16"}),
  ("utf32.jsonl", LINE.decode().encode("utf-32"), 0, {"": "cannot be read: it looks like UTF-32"}),
  (
    "utf16_without_mark.jsonl",
    LINE.decode().encode("utf-16-le"),
    0,
    {"": "cannot be read: it looks like UTF-16-LE"},
  ),
  ("latin1.jsonl", b'{"text": "caf\xe9"}\n' + LINE, 1, {":1": "not UTF-8: byte 0xe9 at 13"}),
  ("empty.jsonl", b"", 0, {"": "no record in this file"}),
  ("blank.jsonl", b" \n\n\t\n", 0, {"": "no record in this file"}),
  ("one_byte.jsonl", b"{", 0, {":1": "not JSON"}),
  ("windows_lines.jsonl", LINE.replace(b"\n", b"\r\n") * 2, 2, {}),
  ("old_mac_lines.jsonl", LINE.replace(b"\n", b"\r") * 2, 0, {":1": "not JSON: Extra data"}),
  ("mixed_lines.jsonl", LINE + b"\n\r\n" + LINE.replace(b"\n", b"\r\n") + LINE.strip(), 3, {}),
  ("nul.jsonl", b'{"text": "a\\u0000b"}\n{"text": "a\0b"}\n', 1, {":2": "not JSON"}),
  ("long_line.jsonl", b'{"text": "' + b"word " * 200_000 + b'"}', 1, {}),
  ("digits.jsonl", b'{"text": "x", "n": %s}\n' % (b"1" * 100_000) + LINE, 1, {":1": "not JSON"}),
  ("deep.jsonl", b'{"n": %s%s}' % (b"[" * 100_000, b"]" * 100_000), 0, {":1": "not JSON"}),
  ("nan.jsonl", b'{"text": "x", "n": NaN}\n{"text": NaN}', 1, {":2": "field 'text' is float"}),
  ("twice.jsonl", b'{"text": "x", "text": "y"}', 0, {":1": "not JSON: field 'text' occurs twice"}),
  ("null.jsonl", b'{"text": null}', 0, {":1": "field 'text' is NoneType, not text"}),
  ("number.jsonl", b'{"text": 3}', 0, {":1": "field 'text' is int, not text"}),
  ("other_field.jsonl", b'{"texts": "x"}', 0, {":1": "there is no field 'text'"}),
  ("list.jsonl", b'["text"]\n"text"', 0, {":1": "a JSON list, not", ":2": "a JSON str, not"}),
  ("surrogate.jsonl", b'{"text": "\\ud83d"}\n' + LINE, 1, {":1": "not text that can be encoded"}),
  ("blank_text.jsonl", b'{"text": " "}', 0, {":1": "the document is empty"}),
  ("cut.jsonl", LINE + LINE[:20], 1, {":2": "not JSON"}),
  ("packed.jsonl.gz", gzip.compress(MANY[:9000]) + gzip.compress(MANY[9000:]), 9000, {}),
  ("packed.JSONL.ZST", zstd(LINE), 1, {}),
  ("not_packed.jsonl.gz", LINE, 1, {}),
  ("misnamed.jsonl", gzip.compress(LINE), 1, {}),
  ("empty.jsonl.gz", b"", 0, {"": "no record in this file"}),
  ("packed_nothing.jsonl.gz", gzip.compress(b""), 0, {"": "no record in this file"}),
  ("damaged.jsonl.gz", b"\x1f\x8bdamaged", 0, {"": "cannot be read: "}),
  ("UPPER.JSONL", LINE, 1, {}),
  ("deeper/plain.jsonl", LINE, 1, {}),
  (os.fsdecode(b"caf\xe9.jsonl"), LINE, 1, {}),
  ("folder.jsonl/inside.jsonl", LINE, 1, {}),
]
# Files that end before they should: some documents, then the problem.
CUT_FILES = {
  name: content[: len(content) * 3 // 4]
  for name, content in {"cut.jsonl.gz": gzip.compress(MANY), "cut.jsonl.zst": zstd(MANY)}.items()
}
LEFT_OUT = {
  "notes.txt": ".txt",
  "NOTES.TXT": ".txt",
  "paper.pdf": ".pdf",
  "table.csv.gz": ".csv.gz",
  "LICENSE": "without a suffix",
  ".hidden.jsonl": "hidden",
  ".git/inside.jsonl": "hidden",
  os.fsdecode(b"x.caf\xe9"): ".caf\\udce9",
}


def make(root: pathlib.Path) -> None:
  contents = {name: content for name, content, *_ in ODD_FILES} | CUT_FILES
  contents |= dict.fromkeys(LEFT_OUT, LINE)
  for name, content in contents.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
  elsewhere = root.parent / "elsewhere"
  elsewhere.mkdir()
  (elsewhere / "far.jsonl").write_bytes(LINE)
  for link, target in {
    "to_folder": elsewhere,
    "to_folder_again": elsewhere,
    "cycle": root,
    "deeper/up": "..",
    "alias.jsonl": "plain.jsonl",
    "broken.jsonl": "nowhere.jsonl",
    "itself.jsonl": "itself.jsonl",
  }.items():
    (root / link).symlink_to(target)
  os.mkfifo(root / "pipe.jsonl")


@pytest.mark.slow
def test_every_outcome_is_stated(tmp_path):
  root = tmp_path / "odd"
  make(root)
  output = tmp_path / "out"
  done = programs.run(
    "experiments.prepare_data",
    "--source=jsonl",
    f"--input={root}",
    "--fields=text",
    f"--tokenizer={tmp_path / 't.model'}",
    "--train_tokenizer_vocab=300",
    f"--output={output}",
  )
  assert done.returncode == 0, done.stderr

  reasons = {
    entry["where"]: entry["reason"]
    for entry in map(json.loads, (output / "bad_records.jsonl").read_text().splitlines())
  }
  documents = Dataset(output).manifest["documents_by_source"]
  for name, _, count, problems in ODD_FILES:
    assert documents.pop(name, 0) == count, name
    for place, reason in problems.items():
      assert reasons.pop(f"{root / name}{place}", "").startswith(reason), (name, place)
  for name in CUT_FILES:
    count = documents.pop(name)
    assert 0 < count < 9000
    expected = f"cannot be read: Truncated compressed stream (after {count} records)"
    assert reasons.pop(str(root / name)) == expected
  assert reasons.pop(str(root / "broken.jsonl")) == "cannot be read: No such file or directory"
  assert reasons.pop(str(root / "itself.jsonl")).startswith("cannot be read: Too many levels")
  assert reasons.pop(str(root / "pipe.jsonl")) == "neither a file nor a folder"
  assert documents == {"to_folder/far.jsonl": 1} and not reasons

  left_out, last = done.stdout.splitlines()[-2:]
  assert left_out.startswith(f"{root}: {len(LEFT_OUT) + 4} files were left out: ")
  counts = {kind: list(LEFT_OUT.values()).count(kind) for kind in LEFT_OUT.values()}
  counts["further links to one file or folder"] = 4
  assert set(left_out.partition("left out: ")[2].split(", ")) == {
    f"{kind} {count}" for kind, count in counts.items()
  }
  bad_records = Dataset(output).manifest["bad_records"]
  assert last.startswith(f"{bad_records} bad records (see {output / 'bad_records.jsonl'})")
