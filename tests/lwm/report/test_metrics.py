import json
import pathlib

import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from configs import laptop
from lwm.errors import UserError
from lwm.report.held_out import by_modality, summary, table
from lwm.report.language import LanguagePresentation
from lwm.report.metrics import FILE_NAME, MetricsLog, read_metrics
from lwm.report.plots import plot_stage
from lwm.report.tensorboard import EventFile
from lwm.report.terminal import count, duration, step_line

PRESENTATION = LanguagePresentation(laptop.get_config())
HELD_OUT = [
  {"dataset": "books", "modality": "text", "loss": 2.0, "unigram_entropy": 5.0, "targets": 300},
  {"dataset": "film", "modality": "text", "loss": 6.0, "unigram_entropy": 1.0, "targets": 100},
  {"dataset": "film", "modality": "vision", "loss": 4.0, "unigram_entropy": 7.0, "targets": 50},
]


def record(step, stage="a"):
  return {
    "kind": "train",
    "stage": stage,
    "step": step,
    "total_steps": step,
    "loss": 5.0 / step,
    "text_loss": 4.0 / step,
    "learning_rate": 1e-3,
    "gradient_norm": 1.0,
    "seconds": 0.5,
    "tokens_per_second": 1000.0,
  }


def evaluation(step, stage="a"):
  return {
    "kind": "evaluation",
    "stage": stage,
    "step": step,
    "total_steps": step,
    "held_out": HELD_OUT,
  }


def test_a_damaged_line_is_named(tmp_path):
  path = tmp_path / FILE_NAME
  for damaged in (b"\0\0\0\n", b"\xff\n", b'{"kind": "train"\n'):
    path.write_bytes(b'{"kind": "train"}\n' + damaged + b'{"kind": "train"}\n')
    with pytest.raises(UserError, match=f"Line 2 of {path} is damaged: restore the file"):
      read_metrics(path)


def test_resuming_forgets_what_lies_beyond_and_a_line_cut_short(tmp_path):
  log = MetricsLog(tmp_path, 0)
  for step in (1, 2, 3):
    log.write(record(step))
  log.write(evaluation(3))
  log.close()
  path = tmp_path / FILE_NAME
  with path.open("a") as file:
    file.write('{"kind": "tra')
  assert read_metrics(path) == [record(1), record(2), record(3), evaluation(3)]

  log = MetricsLog(tmp_path, 2)
  log.write(record(3))
  log.sync()
  # What was written is there although the log is still open.
  assert [json.loads(line) for line in path.read_text().splitlines()] == [
    record(1),
    record(2),
    record(3),
  ]
  log.close()


def test_a_new_run_starts_an_empty_file(tmp_path):
  (tmp_path / FILE_NAME).write_text(json.dumps(record(7)) + "\n")
  MetricsLog(tmp_path, 0).close()
  assert read_metrics(tmp_path / FILE_NAME) == []


def test_tensorboard_events(tmp_path, monkeypatch):
  written = []
  monkeypatch.setattr(EventFile, "add_scalar", lambda self, *args: written.append(args))
  log = MetricsLog(tmp_path, 0)
  log.write(record(2))
  log.write(evaluation(2))
  log.close()
  assert ("train/text_loss", 2.0, 2) in written
  assert ("held_out/film/vision_loss", 4.0, 2) in written
  assert ("held_out/film/vision_unigram_entropy", 7.0, 2) in written
  assert list(pathlib.Path(tmp_path, "tensorboard").glob("events.*"))


def test_an_event_file_is_one_that_tensorboard_reads(tmp_path):
  for purge_step in (1, 2):
    events = EventFile(tmp_path / "tensorboard", purge_step)
    events.add_scalar("train/loss", 2.5, purge_step)
    events.close()
  found = []
  for path in sorted((tmp_path / "tensorboard").iterdir()):
    assert ".out.tfevents." in path.name
    records = path.open("rb")
    while header := records.read(12):
      event = event_pb2.Event.FromString(records.read(int.from_bytes(header[:8], "little")))
      records.read(4)
      found += [(value.tag, value.simple_value, event.step) for value in event.summary.value]
      if event.session_log.status == event_pb2.SessionLog.START:
        found.append(event.step)
  assert found == [1, ("train/loss", 2.5, 1), 2, ("train/loss", 2.5, 2)]


def test_curves(tmp_path):
  path = tmp_path / "a.png"
  plot_stage(PRESENTATION, [record(1), record(2), evaluation(2), record(3, "b")], "a", path)
  with Image.open(path) as image:
    assert image.size == (960, 720)
    assert len(image.convert("RGB").getcolors(1 << 20)) > 10
  assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_held_out_means_count_targets():
  totals = by_modality(HELD_OUT)
  assert totals["text"] == {"loss": 3.0, "unigram_entropy": 4.0, "targets": 400}
  assert totals["vision"] == {"loss": 4.0, "unigram_entropy": 7.0, "targets": 50}
  assert summary(HELD_OUT) == (
    "text 3.000 (unigram entropy 4.000) | vision 4.000 (unigram entropy 7.000)"
  )
  lines = table(HELD_OUT).splitlines()
  assert [line.split() for line in lines[1:]] == [
    ["books", "text", "2.000", "5.000", "300"],
    ["film", "text", "6.000", "1.000", "100"],
    ["film", "vision", "4.000", "7.000", "50"],
    ["all", "text", "3.000", "4.000", "400"],
    ["all", "vision", "4.000", "7.000", "50"],
  ]


def test_step_line():
  line = step_line(PRESENTATION, record(2) | {"mfu": 0.314}, 200, "3m05s")
  assert line == (
    "a   2/200 | loss 2.500 | text 2.000 | grad 1.00 | lr 1.0e-03 | 0.50 s | 1k tok/s | "
    "MFU 31.4% | 3m05s left"
  )


def test_durations_and_counts():
  assert [duration(s) for s in (0.4, 59.6, 185, 3905, 180000)] == [
    "0s",
    "1m00s",
    "3m05s",
    "1h05m",
    "2d02h",
  ]
  assert [count(v) for v in (987.4, 12345, 4.56e6)] == ["987", "12.3k", "4.56M"]
