"""Evaluations of what a model says about images and films, and of what it generates."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from experiments import inference
from experiments.evaluation_run import Run
from lwm import evals, infer
from lwm.data import TRAIN, VALIDATION
from lwm.errors import UserError
from lwm.evals import choices, generation as metrics
from lwm.evals.answers import AnswerFile
from lwm.evals.prompts import PromptWriter
from lwm.infer.films import read_codes, vision_ids
from lwm.vision.codec import Codec
from lwm.vision.pictures import decibels, save_contact_sheet
from lwm.vision.video import crop_and_resize

# Maximum number of tokens in the answer to a question of --questions.
_ANSWER_TOKENS = 16
# Maximum number of clips on the report page.
_SHOWN = 4


def multiple_choice(run: Run) -> None:
  """Asks the questions of --questions in LLaVA's response formats."""
  questions, most = run.inputs.questions(), run.inputs.contexts()[-1]
  answer_tokens = run.answer_tokens(_ANSWER_TOKENS)
  writer = PromptWriter(run.checkpoint.tokenizer, run.options.chat)
  frames = [question.frame for question in questions]
  if not run.options.chat:
    frames = [dataclasses.replace(frame, answer_prefix="\nAnswer:") for frame in frames]

  def prompts(vision: list[list[int]]) -> list[list[int]]:
    rows = [writer.write(frame, ids) for frame, ids in zip(frames, vision)]
    for question, row in zip(questions, rows):
      if len(row) + answer_tokens > most:
        raise UserError(
          f"The question of line {question.line} has {len(row):,} tokens and an answer up to "
          f"{answer_tokens:,}, more than the {most:,} of --contexts: make --contexts longer, or "
          "take fewer --frames_per_second."
        )
    return rows

  # Check the lengths without films first: reading films takes long.
  prompts([[] for _ in questions])
  rows = prompts(run.inputs.question_codes(questions, run.checkpoint))
  files = json.dumps(run.inputs.fingerprint("questions"))
  settings = run.settings("multiple_choice") | {
    "questions": hashlib.sha256(files.encode()).hexdigest()[:16],
    "chat": run.options.chat,
    "answer_tokens": answer_tokens,
    "temperature": run.flags.text.temperature,
    "frames_per_second": run.flags.frames_per_second,
  }
  file = AnswerFile(run.output / "multiple_choice" / "answers.jsonl", settings)
  if file.records:
    print(f"multiple_choice: {len(file.records):,} of {len(questions):,} answers exist")
  for _ in choices.ask(run.answerer(), file, questions, rows, answer_tokens):
    print(f"multiple_choice: {len(file.records):,} of {len(questions):,}", flush=True)
  table = []
  for score in choices.summary(file.records):
    shares = ["" if share is None else f"{share:.1%}" for share in score[2:]]
    table.append((score.name, score.questions, *shares))
    print(
      f"multiple_choice: {score.name}: {score.questions:,} questions, exact match {shares[0]}"
      + (f", likeliest letter {shares[1]}, chance {shares[2]}" if shares[1] else "")
    )
  header = ("answer", "questions", "exact match", "likeliest letter", "chance")
  sections = {
    "Scores": evals.report.html_table(header, table),
    "Wrong or incomplete answers": evals.report.mistakes(file.records),
  }
  page = file.path.parent / "report.html"
  evals.report.write_html(page, f"multiple_choice: {run.title}", settings, sections)
  print(f"multiple_choice: {page}")


def visual_encoder(run: Run) -> Callable[[Sequence[Any]], list[int]]:
  """Makes the ids of PIL images and of films, given as paths."""
  checkpoint, codec = run.checkpoint, run.checkpoint.codec()
  layout, side = codec.config.layout, codec.config.resolution

  def codes(visual: Any) -> np.ndarray:
    if isinstance(visual, Image.Image):
      return codec.encode(crop_and_resize(visual.convert("RGB"), side)[None])
    if not isinstance(visual, str):
      raise UserError(
        f"A task shows a {type(visual).__name__}, not an image or the path of a film."
      )
    (codes_Nxhxw,) = read_codes(
      [visual],
      codec,
      jax.local_devices(),
      frames_per_second=run.flags.frames_per_second,
      max_frames=max(1, run.inputs.contexts()[-1] // layout.tokens_per_frame),
    )
    return codes_Nxhxw

  def encode(visuals: Sequence[Any]) -> list[int]:
    # The mesh of the weights is set by now, and films are encoded on a mesh of their own.
    with jax.set_mesh(None):
      frames = [codes(visual).reshape(-1, layout.codes_per_frame) for visual in visuals]
    return vision_ids(checkpoint.tokenizer, checkpoint.text_vocab_size, layout, frames).tolist()

  return encode


def generation(run: Run) -> None:
  """Continues held-out clips, or generates them from captions; compares with the true clips."""
  checkpoint, given, frames = run.checkpoint, run.inputs.given_frames, run.inputs.frames
  dataset = run.inputs.video_dataset(checkpoint)
  codec = checkpoint.codec(dataset)
  clips = run.inputs.clips(checkpoint, dataset, VALIDATION, run.options.samples)
  others = run.inputs.clips(checkpoint, dataset, TRAIN, len(clips))
  if len(clips) < 2 or len(others) < 2:
    raise UserError(
      f"{dataset.path} has {len(clips)} held-out clips of {given} + {frames} frames and "
      f"{len(others)} such training clips, but this evaluation needs 2 of each: raise --samples, "
      "or lower --given_frames or --frames."
    )
  choice = infer.Choice(top_k=inference.FILM_TOP_K)
  settings = run.settings("generation") | {
    "dataset": str(dataset.path),
    "vqgan": codec.sha256,
    "given_frames": given,
    "frames": frames,
    "seed": run.flags.seed,
    "temperature": choice.temperature,
    "top_k": choice.top_k,
  }
  file = AnswerFile(run.output / "generation" / "clips.jsonl", settings)
  grammar = checkpoint.pictures(codec, frames, choice)
  _generate(run, codec, grammar, clips, file)
  records = {record["case"]: record for record in file.records}
  own = [records[str(document)] for document in clips]
  made_CxNxP = np.array([record["codes"] for record in own], np.int32)
  true_CxNxP, others_CxNxP = (
    np.stack([clip.codes_NxP[given:] for clip in some.values()]) for some in (clips, others)
  )
  sections: dict[str, object] = {
    "Sets": _sets(codec, {"generated": made_CxNxP, "training clips": others_CxNxP}, true_CxNxP)
  }
  if given:
    sections["Frames against the truth"] = _frames(own)
  folder = file.path.parent
  sheet = []
  for clip, made_NxP in zip(list(clips.values())[:_SHOWN], made_CxNxP):
    both = clip.codes_NxP, np.concatenate([clip.codes_NxP[:given], made_NxP])
    sheet += [codec.decode(codes_NxP) for codes_NxP in both]
  save_contact_sheet(folder / "clips.png", sheet, scale=1)
  sections[f"Clips: truth above, and below it {given} given frames and what was generated"] = (
    folder / "clips.png"
  )
  page = folder / "report.html"
  evals.report.write_html(page, f"generation: {run.title}", settings, sections)
  print(f"generation: {page}")


def _generate(
  run: Run, codec: Codec, grammar: infer.Grammar, clips: dict[int, infer.Clip], file: AnswerFile
) -> None:
  """Generates after the prompts that have no record in the file, and adds records to it."""
  done = {record["case"] for record in file.records}
  missing = [document for document in clips if str(document) not in done]
  answerer = run.answerer()
  for first in range(0, len(missing), answerer.rows):
    batch = missing[first : first + answerer.rows]
    made = metrics.continue_clips(
      answerer.engine,
      grammar,
      [clips[document].prompt for document in batch],
      [run.flags.seed + document for document in batch],
      answerer.rows,
    )
    for document, codes_NxP in zip(batch, made):
      errors = metrics.compare_with_truth(codec, clips[document], codes_NxP)
      file.add([{"case": str(document), "codes": codes_NxP.tolist(), **errors}])
    print(f"generation: {len(file.records):,} of {len(clips):,} clips", flush=True)


def _sets(codec: Codec, sets: dict[str, np.ndarray], true_CxNxP: np.ndarray) -> str:
  """Prints how each set of clips differs from the true clips, and returns an HTML table."""
  rows, names = [], list[str]()
  for name, clips_CxNxP in (sets | {"held-out clips": true_CxNxP}).items():
    found = metrics.compare_sets(codec, clips_CxNxP, true_CxNxP)
    names = [key.replace("_", " ") for key in found]
    rows.append((name, *(f"{value:.4g}" for value in found.values())))
    print(f"generation: {name}: " + ", ".join(map(" ".join, zip(names, rows[-1][1:]))))
  return evals.report.html_table(("set", *names), rows)


def _frames(records: Sequence[dict[str, Any]]) -> str:
  """Prints the errors of each generated frame and of a still; returns an HTML table."""
  rows = []
  for frame in range(len(records[0]["ssim"])):
    row: list[object] = [frame + 1]
    for kind in ("", "still_"):
      error = float(np.mean([record[f"{kind}squared_error"][frame] for record in records]))
      similarity = np.mean([record[f"{kind}ssim"][frame] for record in records])
      row += [f"{decibels(error):.2f}", f"{similarity:.3f}"]
    rows.append(row)
    print("generation: frame {}: PSNR {} dB, SSIM {}; still: {} dB, {}".format(*row))
  header = ("frame", "PSNR (dB)", "SSIM", "PSNR of a still (dB)", "SSIM of a still")
  return evals.report.html_table(header, rows)
