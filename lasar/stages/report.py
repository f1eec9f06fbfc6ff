"""report: one self-contained HTML page of a run: metrics, curves, semantic IDs, slices, examples.

Reads the artifacts named in `include`; writes `report.html`, which loads nothing from anywhere.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lasar.artifacts import StageContext, read_json
from lasar.config import StageConfig
from lasar.errors import ArtifactError, require
from lasar.evaluation import report_content as content
from lasar.evaluation.report_latent import depth_section, latent_section
from lasar.evaluation.report_rl import rl_section

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """What the page shows."""

    include: tuple[str, ...] = ("prepare", "quantize", "sft", "latent_sft", "rl", "evaluate")
    """Stages whose artifacts are shown; `prepare` must be one of them."""
    title: str = ""
    """Heading of the page; empty: the name of the data set."""


def inputs(config: Config) -> tuple[str, ...]:
    """Artifacts read."""
    return config.include


def sources(config: Config) -> tuple[Path, ...]:
    """Files read outside the run folder: none."""
    return ()


def run(config: Config, context: StageContext) -> None:
    """Read what there is, lay it out, write one file."""
    folders = dict(context.inputs)
    if "prepare" not in folders:
        raise ArtifactError("report.include: must name 'prepare', which says what the data set is")
    prepare = read_json(folders["prepare"] / "summary.json")
    metrics = _optional_json(folders.get("evaluate"), "metrics.json")
    quality = _optional_json(folders.get("quantize"), "quality.json")

    sections = []
    if metrics is not None:
        sections.append(content.metrics_section(metrics))
        if metrics["depth"]["mean"] > 0:
            sections.append(depth_section(metrics, _optional_json(folders["evaluate"], "latency.json")))
    for stage, folder in folders.items():
        trained = _optional_json(folder, "metrics.json")
        if stage == "rl" and trained is not None:
            sections.append(rl_section(_read_lines(folder / "curve.jsonl"), trained))
        elif (folder / "curve.jsonl").is_file():
            sections.append(content.curve_section(stage, _read_lines(folder / "curve.jsonl")))
        if trained is not None and "valid_depths" in trained:
            sections.append(latent_section(stage, trained))
    if quality is not None:
        sections.append(content.quality_section(quality, _embedded(folders["quantize"] / "quality.png")))
    if metrics is not None:
        sections.append(content.slices_section(metrics))

    sentence, facts = content.header(prepare, metrics)
    page = _template().render(
        title=config.title or f"Recommendations for {prepare['dataset']}",
        sentence=sentence,
        facts=facts,
        sections=sections,
        examples=_optional_json(folders.get("evaluate"), "examples.json") or [],
    )
    (context.output / PAGE).write_text(page, encoding="utf-8")


def show(folder: Path, console: Console) -> None:
    """Say where the page is."""
    console.print(f"report: {folder / PAGE} (open it in a browser)", highlight=False, soft_wrap=True)


def _template() -> Any:
    jinja2 = require("jinja2", extra="report")
    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def _optional_json(folder: Path | None, name: str) -> Any:
    if folder is None or not (folder / name).is_file():
        return None
    return read_json(folder / name)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ArtifactError(f"{path}: not one JSON value per line: {error}") from None


def _embedded(path: Path) -> str | None:
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
