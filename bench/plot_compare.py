"""Draw a result of `infir2 compare`: curves of every run overlaid, and the difference to the baseline.

python bench/plot_compare.py bench/results/compare_138m_decay_h200.json docs/img/compare_138m_decay.svg
"""

import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "infir2", "font.size": 9, "axes.spines.top": False})
matplotlib.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
from matplotlib import pyplot as plt  # noqa: E402 - the back end has to be chosen first

COLOURS = ("#2155cd", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#5f3dc4", "#0b7285")


def main(result_file: Path, out: Path) -> None:
    result = json.loads(result_file.read_text())
    figure, (curves, differences) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    baseline = result["curves"][result["baseline"]]
    for (name, runs), colour in zip(result["curves"].items(), COLOURS, strict=False):
        for index, (seed, run) in enumerate(runs.items()):
            label = name if index == 0 else None
            curves.plot(run["step"], run["loss"], color=colour, lw=0.8, alpha=0.7, label=label)
            held_out = run["held_out"]  # empty where a run was cut off
            curves.plot([s for s, _ in held_out], [loss for _, loss in held_out], "o", color=colour, ms=4)
            if name != result["baseline"]:
                pairs = zip(run["loss"], baseline[seed]["loss"])
                # None: the loss of a step that was skipped
                percent = [math.nan if None in (a, b) else 100 * (a / b - 1) for a, b in pairs]
                differences.plot(run["step"][: len(percent)], percent, color=colour, lw=0.8, label=label)
    curves.set(xlabel="step", title="training loss (lines), held-out loss (dots)")
    differences.set(xlabel="step", title=f"training loss against {result['baseline']}, same seed, percent")
    differences.axhline(0, color="black", lw=0.8)
    curves.legend(frameon=False)
    differences.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
