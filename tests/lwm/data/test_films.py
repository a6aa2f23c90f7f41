"""What a folder and a manifest say about films."""

import json

import pytest

from lwm.data.films import digest, read_films
from lwm.errors import UserError
from lwm.vision.decoder_process import Clip


def test_a_folder_with_a_link_to_itself(tmp_path):
  for name in ("b/2.mp4", "b/1.mp4", "a.jpg", ".hidden", ".more/3.mp4"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  (tmp_path / "b" / "up").symlink_to(tmp_path)
  films = read_films(tmp_path)
  assert [film.key for film in films] == ["a.jpg", "b/1.mp4", "b/2.mp4"]
  assert [film.source for film in films] == [".", "b", "b"]
  assert all(film.where == film.path == str(tmp_path / film.key) for film in films)


def write(path, *lines) -> str:
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def test_a_manifest(tmp_path):
  turns = [{"role": "user", "content": "What is it?"}]
  manifest = write(
    tmp_path / "films.jsonl",
    {"path": "x/1.mp4", "start": 1, "end": 2.5, "captions": "one"},
    {"path": "/2.mp4", "captions": ["one", "two"]},
    {"path": "3.jpg", "turns": turns},
    {"content": ["one", {"path": "x/4.mp4", "start": 3}, "two", {"path": "5.jpg"}]},
  )
  first, second, third, fourth = read_films(manifest)
  assert (first.path, first.start, first.end) == (str(tmp_path / "x" / "1.mp4"), 1, 2.5)
  assert first.captions == ("one",) and second.captions == ("one", "two")
  assert (second.path, second.end, third.turns) == ("/2.mp4", None, turns)
  clips = [Clip(str(tmp_path / "x" / "4.mp4"), 3), Clip(str(tmp_path / "5.jpg"))]
  assert fourth.content == ("one", clips[0], "two", clips[1])
  assert fourth.clips == clips and fourth.key == "x/4.mp4"
  assert first.clips == [Clip(first.path, 1, 2.5)]
  assert not any(film.problem for film in (first, second, third, fourth))
  changed = write(tmp_path / "films.jsonl", {"path": "x/1.mp4"})
  assert digest(read_films(changed)) != digest([first, second, third])


@pytest.mark.parametrize(
  "line, problem",
  [
    ({"caption": "x"}, "field 'caption' is unknown; the fields are path, start, "),
    ({"start": 1}, "there is no path"),
    ({"path": "x", "start": "1"}, "start is '1', not a number of seconds"),
    ({"path": "x", "end": True}, "end is True, not a number of seconds"),
    ({"path": "x", "start": 3, "end": 3}, "the part from 3 s to 3 s is empty"),
    ({"path": "x", "start": -1}, "the part from -1 s to None s is empty"),
    ({"path": "x", "captions": [1]}, "captions is neither a text nor a list of texts"),
    ({"path": "x", "captions": "a", "turns": [1]}, "it has captions and turns"),
    (["x"], "a JSON list, not an object"),
    ({"content": ["x"]}, "content has no film"),
    ({"content": "x"}, "content is not a list of texts and films"),
    ({"content": [{"path": "x"}], "start": 1}, "it has content and other fields"),
    ({"content": [{"path": "x", "captions": "a"}]}, "field 'captions' of a film is unknown"),
    ({"content": [{"path": "x", "end": 0}]}, "the part from 0 s to 0 s is empty"),
  ],
)
def test_bad_lines_are_named(tmp_path, line, problem):
  manifest = write(tmp_path / "films.jsonl", {"path": "good.mp4"}, line)
  good, bad = read_films(manifest)
  assert not good.problem and problem in bad.problem
  assert bad.where == f"{manifest}:2"


def test_an_input_without_films_is_refused(tmp_path):
  for path in (tmp_path / "missing", tmp_path):
    with pytest.raises(UserError, match=f"{path}.*: name a folder of films or a manifest"):
      read_films(path)
