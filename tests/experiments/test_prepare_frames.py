"""`python -m experiments.prepare_frames`, as a user runs it."""

from PIL import Image

from lwm.data.frames import FrameDataset
from tests import programs
from tests.lwm import films


def test_films_and_images_by_two_workers(tmp_path):
  folder, output = tmp_path / "films", tmp_path / "data" / "frames"
  folder.mkdir()
  films.write_film(folder / "a.mp4", 12)
  films.write_sound(folder / "b.wav")
  Image.new("RGB", (40, 30), "red").save(folder / "c.png")
  command = [f"--input={folder}", f"--output={output}", "--resolution=16", "--films_per_part=1"]
  command += ["--validation_fraction=0.5", "--decoders=1"]
  share = programs.run("experiments.prepare_frames", *command, "--num_shards=2", "--shard_index=0")
  assert share.returncode == 0, share.stderr
  assert "shard 0 of 2: complete" in share.stdout and not output.exists()
  rest = programs.run("experiments.prepare_frames", *command)
  assert rest.returncode == 0, rest.stderr
  # Part 1 is the sound. Four frames per second of 1.5 seconds, and the image.
  assert rest.stdout.startswith("part 1: 1 films, 1 of them bad, 0 frames; 1 of 1 parts")
  assert f"1 bad films (see {output / 'bad_records.jsonl'})" in rest.stdout
  dataset = FrameDataset(output)
  counts = [dataset.num_frames(split) for split in ("train", "validation")]
  assert sum(counts) == 7 and min(counts) >= 3
