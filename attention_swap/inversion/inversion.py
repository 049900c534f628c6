"""From a picture to noise that samples back to it: what an inversion is, its methods, and its file.

DDIM inversion walks the sampling ODE backwards under the source prompt, without guidance. Sampling with guidance
leaves that path again; the methods differ in what they do about it:

    ddim             nothing
    null_text        an unconditional embedding of its own for every step, optimised (Mokady et al. 2022)
    negative_prompt  the source prompt as unconditional embedding (Miyake et al. 2023)
    proximal         the same, and a target keeps only the larger part of the guidance (Han et al. 2023)
    direct           the source's branch is set back on the recorded path at every step (Ju et al. 2023)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from ...diffusion.ddim import ddim_step, from_level, invert_step, to_level
from ...diffusion.sigmas import ddim_grid
from ...protocols.text import TextHost
from ...weights.files import read_safetensors, write_whole
from ..steps import StepReport, check_finite
from .null_text import NullTextSettings, optimise_null_text
from .proximal import Proximal

METHODS = ("ddim", "null_text", "negative_prompt", "proximal", "direct")

KEY, VERSION = "blendswap_inversion", 1
"""Metadata entry of an inversion's file, and the version of its layout."""

Facts = Mapping[str, "str | float"]


@dataclasses.dataclass(frozen=True)
class Inversion:
    """A picture as noise and the path to it; float32 on the CPU.

    sigmas: [N+1] descending, the clean end last (0, or the level of the first training timestep).
    trajectory: [N+1, B, C, h, w] in VE space, noise first: x at each of `sigmas`. B is 1.
    null: [N, 1, L, D], the unconditional text embedding of each step; None leaves the negative prompt's.
    method: one of `METHODS`. cfg: what the method was made for.
    facts: what made it and how well it does ("prompt", "model", "psnr", …). With method "proximal" also "proximal"
        ("hard" or "soft") and "quantile", see `Proximal.of`.

    Raises ValueError where the parts do not fit each other.
    """

    sigmas: Tensor
    trajectory: Tensor
    null: Tensor | None
    method: str
    cfg: float
    facts: Facts = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        levels = len(self.sigmas)
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; an inversion's is one of {', '.join(METHODS)}")
        if self.sigmas.ndim != 1 or levels < 2 or not (self.sigmas.diff() < 0).all() or self.sigmas[-1] < 0:
            raise ValueError("sigmas must be a falling sequence of at least two levels that are not negative")
        if self.trajectory.ndim != 5 or self.trajectory.shape[:2] != (levels, 1):
            raise ValueError(
                f"trajectory is {list(self.trajectory.shape)}; with {levels} levels it must be [{levels}, 1, C, h, w]"
            )
        if self.null is not None and (self.null.ndim != 4 or self.null.shape[:2] != (levels - 1, 1)):
            raise ValueError(
                f"null is {list(self.null.shape)}; with {levels} levels it must be [{levels - 1}, 1, L, D]"
            )

    @property
    def steps(self) -> int:
        """N."""
        return len(self.sigmas) - 1

    @property
    def noise(self) -> Tensor:
        """x_T [B, C, h, w] in VE space, at `sigmas[0]`."""
        return self.trajectory[0]

    @property
    def latent(self) -> Tensor:
        """The latent [B, C, h, w] that was inverted, in the scale that the model was trained on."""
        return from_level(self.trajectory[-1], float(self.sigmas[-1]))

    @property
    def channels(self) -> int:
        return self.trajectory.shape[2]

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: all of it, or nothing (an older file stays until the new one is whole)."""
        path = Path(path)
        tensors = {"sigmas": self.sigmas, "trajectory": self.trajectory}
        if self.null is not None:
            tensors["null"] = self.null
        about = {"version": VERSION, "method": self.method, "cfg": self.cfg, "facts": dict(self.facts)}
        payload = save(
            {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()},
            {KEY: json.dumps(about, ensure_ascii=False)},
        )
        write_whole(path, payload)

    @classmethod
    def load(cls, path: str | Path) -> Inversion:
        """Reads a file of `save`.

        Raises FileNotFoundError, and ValueError for a file that is damaged, no inversion, or of another version.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no inversion at {path}; save one with SaveInversion first")
        try:
            tensors, metadata = read_safetensors(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is damaged, or no safetensors file ({error}); invert the picture again and save it"
            ) from error
        about = metadata.get(KEY)
        if about is None:
            raise ValueError(f"{path} holds no inversion: it lacks the entry {KEY}. Choose a file of SaveInversion")
        try:
            about = json.loads(about)
            version = about["version"]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: its description cannot be read ({error!r})") from error
        if version != VERSION:
            raise ValueError(
                f"{path} is an inversion of version {version}, this pack reads version {VERSION}: update the pack, or "
                "invert the picture again"
            )
        try:
            made = cls(
                tensors["sigmas"],
                tensors["trajectory"],
                tensors.get("null"),
                about["method"],
                float(about["cfg"]),
                dict(about["facts"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError(f"{path} holds NaN or infinite values; invert the picture again and save it")
        return made


@dataclasses.dataclass(frozen=True)
class InvertSettings:
    """How to invert. The cfg is the host's. `null_text` is for that method, `proximal` for that one.

    Raises ValueError for an unknown method.
    """

    method: str = "null_text"
    steps: int = 50
    scheduler: str = "ddim_uniform"
    null_text: NullTextSettings = dataclasses.field(default_factory=NullTextSettings)
    proximal: Proximal = dataclasses.field(default_factory=Proximal)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")


@dataclasses.dataclass(frozen=True)
class Inverted:
    """What `invert` gives: the inversion, the latent [1, C, h, w] that sampling it with the host's cfg ends at (in
    the scale that the model was trained on), and a report of each of the N sampling steps."""

    inversion: Inversion
    reconstruction: Tensor
    steps: list[StepReport]


OnStep = Callable[[StepReport], None]


@torch.no_grad()
def invert(
    host: TextHost,
    latent: Tensor,
    settings: InvertSettings = InvertSettings(),
    on_step: OnStep | None = None,
    facts: Facts | None = None,
) -> Inverted:
    """Inverts `latent` [1, C, h, w] (in the scale that the model was trained on) under the host's positive prompt,
    and samples it again with the host's cfg.

    on_step: called after each of the N steps up and of the N steps down, with `phase` "invert" and "sample".
    facts: kept in the inversion beside what the method adds.

    Raises:
        ValueError: a latent with NaN or of more than one picture; cfg 1 with null_text; steps the model lacks.
        FloatingPointError: the model gave NaN or infinite values.
    """
    _check(host, latent, settings.method)
    sigmas = ddim_grid(host.train_sigmas, settings.steps, settings.scheduler)
    trajectory = ddim_inversion(host, latent, sigmas, on_step)
    null, facts, sampled = None, dict(facts or {}), None
    if settings.method == "null_text":
        path, null, reports = optimise_null_text(host, trajectory, sigmas, settings.null_text, on_step)
        sampled = path, reports
        facts |= {"optimiser": settings.null_text.optimiser}
    elif settings.method in ("negative_prompt", "proximal"):
        null = host.positive.float().cpu().expand(len(sigmas) - 1, -1, -1, -1)
        if settings.method == "proximal":
            facts |= settings.proximal.facts()
    facts |= {"scheduler": settings.scheduler}
    inversion = Inversion(sigmas, trajectory, null, settings.method, float(host.cfg), facts)
    path, reports = sampled or sample_source(host, inversion, on_step)
    return Inverted(inversion, from_level(path[-1], float(sigmas[-1])), reports)


@torch.no_grad()
def ddim_inversion(host: TextHost, latent: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """The path from `latent` [1, C, h, w] up to noise under the positive prompt without guidance.

    Returns [N+1, 1, C, h, w] float32 on the CPU in VE space, noise first. N evaluations of the model.
    """
    levels = sigmas.tolist()
    x = to_level(latent.to(host.device, torch.float32), levels[-1])
    path = [x.cpu()]
    seen: list[Tensor] = []

    def predict(x: Tensor, sigma: float) -> Tensor:
        seen.append(host.branch(x, sigma, "cond"))
        return seen[-1]

    for number, index in enumerate(reversed(range(len(levels) - 1))):
        x = invert_step(predict, x, levels[index + 1], levels[index])
        check_finite(x, f"step {number + 1} of the inversion")
        path.append(x.cpu())
        if on_step is not None:
            on_step(StepReport("invert", number, len(levels) - 1, x, seen.pop(), None, 1))
        seen.clear()
    return torch.stack(path[::-1])


@torch.no_grad()
def sample_source(
    host: TextHost, inversion: Inversion, on_step: OnStep | None = None
) -> tuple[Tensor, list[StepReport]]:
    """Samples an inversion with the host's prompt and cfg, as its method says.

    Returns the path [N+1, 1, C, h, w] (float32, CPU, VE space) and a report of each step; `loss` is the mean squared
    difference to the inverted path. With method "direct" the path is the inverted one, and no model is run.
    """
    levels, total = inversion.sigmas.tolist(), inversion.steps
    x = inversion.noise.to(host.device)
    path, reports = [x.cpu()], []
    for index in range(total):
        goal = inversion.trajectory[index + 1].to(host.device)
        if inversion.method == "direct":
            x = x0 = goal
        else:
            null = None if inversion.null is None else inversion.null[index].to(host.device)
            # With the source's own prompt a proximal operator has nothing to act on: both branches are equal.
            x0 = host.guided(x, levels[index], null)
            x = ddim_step(x, x0, levels[index], levels[index + 1])
            check_finite(x, f"step {index + 1} of the reconstruction")
        path.append(x.cpu())
        loss = float(from_level(x - goal, levels[index + 1]).square().mean())
        reports.append(StepReport("sample", index, total, x, x0, loss, 0 if inversion.method == "direct" else 2))
        if on_step is not None:
            on_step(reports[-1])
    return torch.stack(path), reports


def _check(host: TextHost, latent: Tensor, method: str) -> None:
    if latent.ndim != 4 or len(latent) != 1:
        raise ValueError(
            f"latent is {list(latent.shape)}; an inversion takes one picture, [1, C, h, w]: pick one of the batch "
            "(LatentFromBatch) and invert each by itself"
        )
    if not torch.isfinite(latent).all():
        raise ValueError("latent holds NaN or infinite values: check the VAE (fp16 overflows in some) or what made it")
    if method == "null_text" and host.cfg == 1:
        raise ValueError(
            "cfg is 1, where the unconditional branch has no part in the result, so null_text has nothing to optimise: "
            "raise cfg (7.5 as published), or choose ddim"
        )
