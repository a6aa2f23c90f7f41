"""Results as heat maps and one HTML page."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lwm.report.figures import new_figure, save_figure

Record = dict[str, Any]

_MOST_MISTAKES = 50
_STYLE = (
  "body{font:15px system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
  "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}"
  "img{max-width:100%}td.number{text-align:right}"
)


def mean_scores(records: Sequence[Record]) -> dict[tuple[int, int | None], float]:
  """The mean score of each context and place."""
  scores: dict[tuple[int, int | None], list[float]] = {}
  for record in records:
    scores.setdefault((record["context"], record["place"]), []).append(record["score"])
  return {key: float(np.mean(values)) for key, values in scores.items()}


def by_context(records: Sequence[Record]) -> dict[int, float]:
  """The mean score of each context."""
  scores: dict[int, list[float]] = {}
  for record in records:
    scores.setdefault(record["context"], []).append(record["score"])
  return {context: float(np.mean(scores[context])) for context in sorted(scores)}


def context_name(context: int) -> str:
  """A number of tokens as people write it: 1K for 1024."""
  for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
    if context % unit == 0:
      return f"{context // unit}{name}"
  return f"{context:,}"


def heat_map(records: Sequence[Record], title: str, varies: str, path: pathlib.Path) -> None:
  """Writes the mean scores as LWM's figure has them: context by depth, red 0 to green 1.

  Args:
    records: answers.
    title: of the figure.
    varies: what the rows are: "depth", "number", or "" for one row.
    path: of the PNG, which is replaced atomically.
  """
  scores = mean_scores(records)
  contexts = sorted({context for context, _ in scores})
  places = sorted({place for _, place in scores}, key=lambda place: place or 0)
  score_PxC = np.array(
    [[scores.get((context, place), np.nan) for context in contexts] for place in places]
  )
  figure = new_figure(2.5 + 0.7 * len(contexts), 1.8 + 0.35 * len(places))
  axes = figure.subplots()
  image = axes.imshow(score_PxC, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
  for (row, column), score in np.ndenumerate(score_PxC):
    if not np.isnan(score):
      axes.text(column, row, f"{score:.0%}", ha="center", va="center", fontsize=8)
  axes.set_xticks(range(len(contexts)), [context_name(context) for context in contexts])
  axes.set_xlabel("context (tokens)")
  labels = {"depth": "depth (percent)", "number": "number asked for"}
  if varies:
    axes.set_yticks(range(len(places)), [str(place) for place in places])
    axes.set_ylabel(labels[varies])
  else:
    axes.set_yticks([])
  axes.set_title(title, fontsize=10)
  figure.colorbar(image, label="score")
  save_figure(figure, path)


def plot_by_context(
  scores: Mapping[str, Sequence[Mapping[int, float]]], title: str, path: pathlib.Path
) -> None:
  """Writes mean scores by context as a PNG: per name, a point per run and a line for their mean."""
  figure = new_figure(6, 3.6)
  axes = figure.subplots()
  for number, (name, runs) in enumerate(scores.items()):
    color, contexts = f"C{number}", sorted(runs[0])
    means = [np.mean([own[context] for own in runs]) for context in contexts]
    axes.plot(contexts, means, color=color, label=name)
    for own in runs:
      axes.plot(contexts, [own[context] for context in contexts], "o", color=color, markersize=4)
  axes.set_xscale("log", base=2)
  axes.set_xticks(contexts, [context_name(context) for context in contexts])
  axes.set_ylim(-0.03, 1.03)
  axes.set_xlabel("context (tokens)")
  axes.set_ylabel("mean score")
  axes.set_title(title, fontsize=10)
  axes.grid(alpha=0.3)
  axes.legend()
  save_figure(figure, path)


def plot_loss_by_position(
  edges: Sequence[int], losses: Sequence[float], title: str, path: pathlib.Path
) -> None:
  """Writes the mean loss between each two positions of `edges` as a PNG."""
  figure = new_figure(7, 4)
  axes = figure.subplots()
  axes.stairs(losses, edges, baseline=None)
  axes.set_xscale("log", base=2)
  axes.set_xlabel("position (tokens)")
  axes.set_ylabel("loss (nats per token)")
  axes.set_title(title, fontsize=10)
  axes.grid(alpha=0.3)
  save_figure(figure, path)


def html_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
  """A table, with numbers aligned to the right."""

  def cell(value: object) -> str:
    kind = ' class="number"' if isinstance(value, int | float) else ""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return f"<td{kind}>{html.escape(text)}</td>"

  head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
  body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
  return f"<table><tr>{head}</tr>{body}</table>"


def mistakes(records: Sequence[Record]) -> str:
  """A table of the first answers with a score below 1."""
  wrong = [record for record in records if record["score"] < 1][:_MOST_MISTAKES]
  rows = [
    (record["case"], ", ".join(record["answers"]), record["text"], f"{record['score']:.2f}")
    for record in wrong
  ]
  return html_table(("case", "expected", "answer", "score"), rows) if rows else "<p>None.</p>"


def write_html(
  path: pathlib.Path, title: str, settings: Mapping[str, Any], sections: Mapping[str, object]
) -> None:
  """Writes one page that needs no other file.

  Args:
    path: of the page.
    title: of the page.
    settings: shown as a table.
    sections: by heading, HTML or the path of a PNG.
  """
  parts = [f"<h1>{html.escape(title)}</h1>"]
  parts.append(html_table(("setting", "value"), [(n, str(v)) for n, v in settings.items()]))
  for heading, content in sections.items():
    parts.append(f"<h2>{html.escape(heading)}</h2>")
    if isinstance(content, pathlib.Path):
      data = base64.b64encode(content.read_bytes()).decode()
      parts.append(f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">')
    else:
      parts.append(str(content))
  path.write_text(
    f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
    f"<style>{_STYLE}</style>{''.join(parts)}\n",
    "utf-8",
  )
