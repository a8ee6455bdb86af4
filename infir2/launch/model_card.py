"""README.md of a model that one of our runs trained: what it is, made from what, by which commands."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import infir2
from infir2.launch.environment import command

if TYPE_CHECKING:
    from infir2.checkpoint.export_fp8 import Fp8Export
    from infir2.checkpoint.model_source import ModelSource


def model_card(source: "ModelSource", export: "Fp8Export | None") -> dict[str, str]:
    """``{"README.md": text}`` for a checkpoint of a training run; nothing for other sources, whose own card is kept.

    ``export`` is what was quantised, None for a plain folder.
    """
    if not isinstance(source.meta.get("config"), Mapping):
        return {}
    return {"README.md": "\n".join(_lines(source, source.meta, export)) + "\n"}


def _lines(source: "ModelSource", meta: Mapping[str, Any], export: "Fp8Export | None") -> Iterator[str]:
    config, progress = meta["config"], meta.get("progress") or {}
    name = Path(config.get("run", source.path)).name
    run = _run_record(source.path)
    recipe, scale_format, _ = source.trained_fp8()
    yield from (f"# {name}", "")
    yield f"A {source.architecture.model_type} model of {source.architecture.num_parameters():,} parameters, trained"
    steps, tokens = progress.get("step", 0), progress.get("tokens", 0)
    yield f"with infir2 {infir2.__version__}: {steps:,} steps, {tokens:,} tokens trained on."
    yield from ("", "## Origin", "")
    yield f"- Started from: {_parent(config)}"
    yield f"- Checkpoint: `{source.path.name}` of run `{name}`"
    if "command" in run:
        versions = ", ".join(f"{key} {value}" for key, value in run.get("versions", {}).items())
        yield f"- Trained by: `{run['command']}` ({run.get('device', 'unknown device')}; {versions})"
        yield f"- Source revision: {run.get('commit') or 'unknown'}"
    yield f"- Converted by: `{command()}`"
    yield from ("", "## Numbers", "")
    yield f"- Training: recipe `{recipe}`, scales `{scale_format}`"
    yield f"- This folder: {_stored(export)}"
    if export is not None:
        yield from (f"- bfloat16: `{layer}` ({why})" for layer, why in export.skipped.items())
        yield f"- {_fidelity(recipe, scale_format, export)}"
    yield from ("", "## Data", "", "```json", json.dumps(meta.get("data"), indent=1), "```")
    yield from ("", "## Recipe", "", "```json", json.dumps(config, indent=1), "```")


def _stored(export: "Fp8Export | None") -> str:
    if export is None:
        return "plain weights, no quantisation"
    return (
        f"float8_e4m3fn codes with 128 x 128 block scales ({export.scale_format}, stored as {export.scale_dtype}) "
        f"of {len(export.converted)} linear layers; everything else is bfloat16"
    )


def _fidelity(recipe: str, scale_format: str, export: "Fp8Export") -> str:
    """Whether the codes are those of the trainer, and if not, why."""
    if recipe not in ("blockwise", "hybrid"):
        return f"Codes are quantised after training: `{recipe}` does not use 128 x 128 block scales."
    if scale_format != export.scale_format:
        return f"Codes differ from the trainer's, whose scales were {scale_format}."
    if any(reason.startswith("fused with") for reason in export.skipped.values()):
        return "Codes are the trainer's own, but the layers named as fused ran in FP8 in training."
    return "Codes and scales are the very ones that the trainer's next forward pass would use."


def _parent(config: Mapping[str, Any]) -> str:
    model, checkpoint = config.get("model") or {}, (config.get("init") or {}).get("checkpoint")
    if checkpoint:
        return f"checkpoint `{checkpoint}`"
    return f"model folder `{model['path']}`" if model.get("path") else f"random weights, preset `{model.get('preset')}`"


def _run_record(checkpoint: Path) -> dict[str, Any]:
    """run.json of the run that the checkpoint lies in; empty where there is none."""
    try:
        record = json.loads((checkpoint.parent.parent / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
