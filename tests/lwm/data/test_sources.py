import gzip

import pyarrow
import pytest
from pyarrow import parquet

from lwm.data.sources import READERS, FileSource, Problem
from lwm.errors import UserError

MARK = b"\xef\xbb\xbf"
SKIPPABLE_FRAME = b"\x5a\x2a\x4d\x18\3\0\0\0abc"  # Of zstd: magic number, length, content.


def _read(path, content, kind=None):
  """The value or the problem of each record in a file of this content."""
  path.write_bytes(content)
  return [record.problem or record.value for record in FileSource(path, kind)]


def _zstd(content):
  return pyarrow.compress(content, "zstd", True)


@pytest.mark.parametrize(
  "pack", [bytes, gzip.compress, _zstd, lambda content: SKIPPABLE_FRAME + _zstd(content)]
)
@pytest.mark.parametrize(
  "content, outcome",
  [
    (b"a\r\nb\nc\r", "a\r\nb\nc\r"),
    (MARK + "ü".encode(), "ü"),
    (b"x", "x"),
    (b" \n", " \n"),
    (b"", ""),
    (b"caf\xe9", "not UTF-8: byte 0xe9 at 3"),
    ("the fox".encode("utf-16"), "cannot be read: it looks like UTF-16, so convert it to UTF-8"),
    (b"\xfe\xff\x00t\x00h", "cannot be read: it looks like UTF-16, so convert it to UTF-8"),
    ("a fox".encode("utf-32"), "cannot be read: it looks like UTF-32, so convert it to UTF-8"),
    (
      "a fox".encode("utf-16-be"),
      "cannot be read: it looks like UTF-16-BE, so convert it to UTF-8",
    ),
    (b"ELF \0\1", "cannot be read: character 4 is a zero byte, so this is not a text file"),
  ],
)
def test_text(tmp_path, pack, content, outcome):
  assert _read(tmp_path / "x.txt", pack(content)) == [outcome]


@pytest.mark.parametrize(
  "content, outcomes",
  [
    (b'[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
    (MARK + b'\n [\n{"a": "\xc3\xbc"}\n]\n', [{"a": "ü"}]),
    (b'{"a": 1}\n\n{"a": 2}', [{"a": 1}, {"a": 2}]),
    (
      b'[{"a": 1}, [2], null]',
      [{"a": 1}, "a JSON list, not an object", "a JSON NoneType, not an object"],
    ),
    (b"[]", ["no record in this file"]),
    (b"", ["no record in this file"]),
    (b'[{"a": 1}, {"a"', ["not JSON: Expecting ':' delimiter: line 1 column 16 (char 15)"]),
    (b'["\xff"]', ["not UTF-8: byte 0xff at 2"]),
    (b'[{"a": 1, "a": 2}]', ["not JSON: field 'a' occurs twice"]),
    ("[]".encode("utf-16"), ["cannot be read: it looks like UTF-16, so convert it to UTF-8"]),
    (b" \n" * 9000 + b" " * 9000 + b'[{"a": 1}]', [{"a": 1}]),
    (b"{\n}", ["holds one JSON object, not an array or one object per line"]),
    (
      b'{"data": [\n{"a": 1},\n{"a": 2}\n]}',
      ["holds one JSON object, not an array or one object per line"],
    ),
    (
      b'\n{"a"\n{"a": 2}\n{"a": 3}\n',
      ["not JSON: Expecting ':' delimiter: line 2 column 1 (char 5)", {"a": 2}, {"a": 3}],
    ),
  ],
)
def test_json(tmp_path, content, outcomes):
  assert _read(tmp_path / "x.json", content) == outcomes


def test_records_are_numbered_from_1(tmp_path):
  (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}]')
  (tmp_path / "b.jsonl").write_text('{"a": 1}\n\n{"a": 2}')
  parquet.write_table(pyarrow.table({"a": [1, 2]}), tmp_path / "c.parquet")
  keys = {
    kind: [r.key for r in FileSource(tmp_path, kind)] for kind in ("json", "jsonl", "parquet")
  }
  assert keys == {
    "json": ["a.json:1", "a.json:2"],
    "jsonl": ["b.jsonl:1", "b.jsonl:3"],
    "parquet": ["c.parquet:1", "c.parquet:2"],
  }


def _parquet(table):
  sink = pyarrow.BufferOutputStream()
  parquet.write_table(table, sink, write_page_checksum=True, compression="none")
  return sink.getvalue().to_pybytes()


def test_parquet(tmp_path):
  not_utf8 = pyarrow.Array.from_buffers(
    pyarrow.string(),
    2,
    [None, *map(pyarrow.py_buffer, (b"\0\0\0\0\2\0\0\0\3\0\0\0", b"\xff\xfea"))],
  )
  messages = [[{"role": "user", "content": "hi"}], None]
  table = pyarrow.table({"text": ["ü", None], "ids": [[1, 2], []], "messages": messages})
  content = _parquet(table)
  assert _read(tmp_path / "x.parquet", content) == [
    {"text": "ü", "ids": [1, 2], "messages": messages[0]},
    {"text": None, "ids": [], "messages": None},
  ]
  assert _read(tmp_path / "x.parquet", _parquet(pyarrow.table({"text": not_utf8}))) == [
    {"text": Problem("not UTF-8: byte 0xff at 0")},
    {"text": "a"},
  ]
  twins = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
  assert _read(tmp_path / "x.parquet", _parquet(twins)) == [
    "cannot be read: field 'a' occurs twice"
  ]
  assert _read(tmp_path / "x.parquet", _parquet(table[:0])) == ["no record in this file"]
  for wrong in (b"", b"PAR1", content[:-9], gzip.compress(content)):
    (problem,) = _read(tmp_path / "x.parquet", wrong)
    assert problem.startswith("cannot be read: ") and "\n" not in problem


def test_damage_inside_a_parquet_file_is_found(tmp_path):
  content = _parquet(pyarrow.table({"text": ["the quick brown fox"]}))
  place = content.index(b"quick")
  (problem,) = _read(tmp_path / "x.parquet", content[:place] + b"q" + content[place + 1 :])
  assert problem == {"text": "the quick brown fox"}
  (problem,) = _read(tmp_path / "x.parquet", content[:place] + b"Q" + content[place + 1 :])
  assert problem.startswith("cannot be read: could not verify page integrity")


def test_the_kind_is_found_where_only_one_is_possible(tmp_path):
  for kind, (_, suffix) in READERS.items():
    folder = tmp_path / kind
    folder.mkdir()
    for name in (f"x{suffix}", f"y{suffix.upper()}.gz", "z.other"):
      (folder / name).touch()
    for path in (folder, folder / f"x{suffix}", folder / f"y{suffix.upper()}.gz"):
      assert FileSource(path).kind == kind
    with pytest.raises(
      UserError, match="z.other holds no known kind of files: name the kind .*=text"
    ):
      FileSource(folder / "z.other")
  with pytest.raises(UserError, match=f"holds {' and '.join(sorted(READERS))} files"):
    FileSource(tmp_path)


def test_a_suffix_may_name_the_compression(tmp_path):
  for name in ("a.py", "b.py.gz", "c.py.zst"):
    (tmp_path / name).write_text("x")
  assert len(list(FileSource(tmp_path, "text", ".py"))) == 3
  source = FileSource(tmp_path, "text", ".PY.GZ")
  assert [record.key for record in source] == ["b.py.gz"]
  assert source.left_out == {".py": 1, ".py.zst": 1}


def test_a_file_is_known_by_its_own_path(tmp_path):
  (tmp_path / "in" / "z").mkdir(parents=True)
  (tmp_path / "in" / "z" / "file.txt").write_text("x")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "file.txt").write_text("y")
  (tmp_path / "in" / "a").symlink_to("z")
  (tmp_path / "in" / "b.txt").symlink_to("z/file.txt")
  (tmp_path / "in" / "c").symlink_to("../out")
  (tmp_path / "in" / "d.txt").hardlink_to(tmp_path / "out" / "file.txt")
  source = FileSource(tmp_path / "in")
  assert [record.key for record in source] == ["d.txt", "z/file.txt"]
  assert source.left_out == {"further links to one file or folder": 3}


def test_a_folder_of_nothing_but_problems(tmp_path):
  (tmp_path / "broken.txt").symlink_to("nowhere")
  (record,) = FileSource(tmp_path, "text")
  assert record.problem == "cannot be read: No such file or directory"
  with pytest.raises(UserError, match="holds no known kind of files"):
    FileSource(tmp_path)
