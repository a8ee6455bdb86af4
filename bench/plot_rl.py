"""Draw a result of bench/rl_100m.py: held-out accuracy, reward, and how far trainer and engine are apart.

python bench/plot_rl.py bench/results/rl_100m_h100.json docs/img/rl_100m.svg
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "infir2", "font.size": 9, "axes.spines.top": False})
matplotlib.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
from matplotlib import pyplot as plt  # noqa: E402 - the back end has to be chosen first


def plot(result_file: Path, picture: Path) -> None:
    result = json.loads(result_file.read_text(encoding="utf-8"))
    figure, (held_out, reward, apart) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for precision, colour, label in (("bf16", "#2155cd", "BF16"), ("blockwise", "#d9480f", "FP8")):
        run = result["runs"].get(precision, {})
        if "held_out" not in run:
            continue
        step, middle, low, high = zip(*run["held_out"])
        held_out.plot(step, middle, "o-", ms=3, color=colour, label=f"{label}, temperature 1")
        held_out.fill_between(step, low, high, color=colour, alpha=0.15, lw=0)
        if "after" in run:
            greedy = [run[when]["greedy"]["average"] for when in ("before", "after")]
            held_out.plot([0, run["steps"]], greedy, "D", ms=5, mfc="none", color=colour, label=f"{label}, greedy")
        steps = range(1, run["steps"] + 1)
        reward.plot(steps, run["reward"], color=colour, lw=1, label=label)
        apart.plot(steps, run["logprob_diff"], color=colour, lw=1, label=label)
    held_out.set(xlabel="step", title="held-out accuracy")
    reward.set(xlabel="step", title="reward of the rollouts")
    apart.set(xlabel="step", title="|log-prob. of trainer - of engine|")
    apart.set_ylim(bottom=0)
    for axes in (held_out, reward, apart):
        axes.legend(frameon=False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
