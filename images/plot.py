"""The losses of a run as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .lettering import for_matplotlib


def loss_plot(history: Sequence[dict[str, Tensor]], title: str = "") -> Tensor:
    """Losses by step: [1, H, W, 3] in 0..1, one panel per loss, one line per candidate.

    history: for each step the losses [B] by name; a step that was not guided is empty and left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for losses in history for name in losses))
    figure = Figure(figsize=(7.2, 1.2 + 2.2 * max(len(names), 1)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(names), 1), 1, squeeze=False)[:, 0]
    for panel, name in zip(panels, names, strict=False):  # without a loss there is one panel, and no name
        steps = [number + 1 for number, losses in enumerate(history) if name in losses]
        values = torch.stack([losses[name].detach().float().cpu() for losses in history if name in losses])
        # A line through one point alone shows nothing.
        panel.plot(steps, values.numpy(), linewidth=1, marker="." if len(steps) == 1 else None)
        label, how = for_matplotlib(textwrap.fill(name, 24))
        panel.set_ylabel(label, fontsize=10 if len(name) < 24 else 7, **how)
        panel.set_xlim(0.5, max(len(history), 1) + 0.5)
        panel.grid(alpha=0.3)
    if not names:
        panels[0].text(0.5, 0.5, "no step was guided", ha="center", va="center")
        panels[0].set_axis_off()
    panels[-1].set_xlabel("step")
    if title:
        shown, how = for_matplotlib(textwrap.fill(title, 100))
        figure.suptitle(shown, fontsize=10, **how)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).float().div(255)[None]
