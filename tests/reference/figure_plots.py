"""The plots of docs/figures.md, as SVG with its text as text. The same figures give the same bytes."""

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "conceptloom", "font.size": 10, "figure.facecolor": "white",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False,
})  # fmt: skip
import matplotlib.pyplot as plt

COLORS = ["#2066a8", "#8c8c8c", "#2a9d5c", "#c4532a", "#8450a8", "#b08a00"]


def save(figure, file):
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)


def curves(file, panels, x_label, y_label):
    """One panel per title: label -> (x, y); a curve of one point is a level."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), sharey=True, squeeze=False)
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    color = {label: COLORS[k % len(COLORS)] for k, label in enumerate(labels)}
    for axis, (title, lines) in zip(axes[0], panels.items()):
        for label, (x, y) in lines.items():
            if len(x) == 1:
                axis.axhline(y[0], color=color[label], linestyle="--", label=label)
            else:
                axis.plot(x, y, color=color[label], marker="o", markersize=3, label=label)
        axis.set_title(title)
        axis.set_xlabel(x_label)
    axes[0][0].set_ylabel(y_label)
    handles = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3)
    save(figure, file)


def bars(file, groups, series, y_label):
    """One bar per group and label; label -> (heights, deviations or None)."""
    figure, axis = plt.subplots(figsize=(9, 3.4))
    width = 0.8 / len(series)
    for k, (label, (heights, deviations)) in enumerate(series.items()):
        at = [group + (k - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axis.bar(at, heights, width, yerr=deviations, color=COLORS[k], label=label, error_kw={"linewidth": 1})
    axis.set_xticks(range(len(groups)), groups)
    axis.set_ylabel(y_label)
    axis.set_ylim(0, 1)
    axis.grid(False, axis="x")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(series))
    save(figure, file)
