"""Runs for the tests of the report: folders as training leaves them, and a reader of the page that is made of them."""

import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

from infir2.train.metrics import MetricsWriter

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def synthetic_run(
    folder: Path, *, recipe: str = "bf16", steps: int = 60, seed: int = 0, layers: int = 2, resume_at: int = 0
) -> Path:
    """A run folder as training leaves it: plausible curves, evaluations, health, one skipped step, maybe a resume."""
    fp8, rng = recipe != "bf16", random.Random(seed)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        f'run = "{folder.name}"\n\n[model]\npreset = "qwen2.5-1.5b"\n\n[fp8]\nrecipe = "{recipe}"\n\n'
        f'[optim]\nlr = 1e-4\nschedule = "wsd"\n\n[train]\nsteps = {steps}\nglobal_batch = 64\nseed = {seed}\n'
    )
    versions = {"python": "3.12.4", "torch": "2.13.0", "triton": "3.7.1"}
    command = ["infir2", "cpt", "recipes/cpt_1.5b.toml", "--fp8.recipe", recipe, "--run", f"runs/{folder.name}"]
    facts = {"command": command, "versions": versions, "device": "an accelerator, 80 GB", "commit": "0123abcd"}
    (folder / "run.json").write_text(json.dumps({**facts, "started": "2026-01-02T03:04:05+00:00"}))
    writer = MetricsWriter(folder, steps, tensorboard=False, live=False)
    for step in range(1, steps + 1):
        if step == resume_at:
            writer.close()
            writer = MetricsWriter(folder, steps, tensorboard=False, live=False, first_step=step - 1)
            writer.event(step - 1, "resume", checkpoint=f"step-{step - 1:06d}")
        noise = rng.gauss(0, 0.03)
        loss = 2.1 + 6.5 * math.exp(-14 * step / steps) + 0.5 * math.exp(-3 * step / steps) + 0.0015 * fp8 + noise
        skipped = int(step > steps // 2)
        writer.log(step, {
            "loss": math.nan if step == steps // 2 + 1 else loss,
            "lr": 1e-4 * min(1.0, step / (0.05 * steps), (steps - step) / (0.2 * steps) + 0.01),
            "grad_norm": math.exp(rng.gauss(-0.5, 0.25)) * (20 if rng.random() < 0.003 else 1),
            "tokens": step * 2_097_152,
            "tokens_per_s": (41_000 if fp8 else 30_500) * rng.uniform(0.97, 1.02),
            "mfu": (0.52 if fp8 else 0.41) * rng.uniform(0.97, 1.02),
            "peak_memory_gb": 50.2 if fp8 else 69.8,
            "step_time_s": 51.0 if fp8 else 68.7,
            "skipped": skipped,
            "valid_tokens": 2_097_000,
        })  # fmt: skip
        if step % max(1, steps // 20) == 0:
            writer.log(step, {"eval_loss": loss - noise + 0.02 + rng.gauss(0, 0.002)}, kind="eval")
            if fp8:
                writer.health(step, synthetic_health(rng, layers))
    writer.close()
    return folder


def synthetic_health(rng: random.Random, layers: int) -> dict[str, dict[str, float]]:
    measured = {}
    for layer in range(layers):
        for module in MODULES + MLP:
            depth = layer / layers + 0.6 * (module == "mlp.down_proj")
            measured[f"model.layers.{layer}.{module}"] = {
                **{f"{o}_underflow": 10 ** (rng.gauss(-4.2, 0.3) + 2 * depth * (o == "g")) for o in "xwg"},
                **{f"{o}_sqnr_db": 31.5 - 3 * depth * (o != "w") + rng.gauss(0, 0.3) for o in "xwg"},
                **{f"{o}_saturated": 0.0 for o in "xwg"},
            }
    return measured


class Page(HTMLParser):
    """Collects what a browser would fetch or run, unclosed tags, ids, and the text outside style sheets."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetches: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action") and not (value or "").startswith("#"):
                self.fetches.append(f"{name}={value}")
            assert not name.startswith("on"), f"event handler {name}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
