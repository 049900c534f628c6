"""Null-text optimisation (Mokady et al. 2022): unconditional embeddings keep guided sampling on an inverted path."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...diffusion.cfg import guided
from ...diffusion.ddim import ddim_step, from_level
from ...protocols.text import TextHost
from ..steps import StepReport, check_finite

OPTIMISERS = ("fast", "published")

SLOPE = 2e-5
"""How much the published loop's tolerance grows with each of its 50 steps."""

PUBLISHED_STEPS = 50

WORTHWHILE = 0.1
"""Part of a step's loss that an update of the fast optimiser must take off for another to follow: what an embedding
cannot mend is left to the steps to come, which see it in x."""


@dataclasses.dataclass(frozen=True)
class NullTextSettings:
    """Null-text optimisation.

    optimiser: "published" is the published loop; "fast" reaches what it reaches with fewer evaluations.
    inner_steps: most updates of the embedding in one step. lr: of the published loop's Adam.
    early_stop: tolerance of the first step, as a mean squared error in the scale that the model sees. It grows by 1e-3
        over the 50 steps as published; "published" adds 2e-5 a step whatever their number, "fast" 1e-3 over all.

    Raises ValueError for values out of range.
    """

    optimiser: str = "fast"
    inner_steps: int = 10
    lr: float = 1e-2
    early_stop: float = 1e-5

    def __post_init__(self) -> None:
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser is {self.optimiser!r}; choose fast or published")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps is {self.inner_steps}; it must be at least 1 (10 as published)")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0 (0.01 as published)")
        if not self.early_stop >= 0:
            raise ValueError(f"early_stop is {self.early_stop}; it must not be negative (1e-5 as published)")

    def tolerance(self, index: int, total: int) -> float:
        """Of step number `index` of `total`."""
        share = 1.0 if self.optimiser == "published" else PUBLISHED_STEPS / total
        return self.early_stop + SLOPE * index * share


@dataclasses.dataclass
class _Step:
    """One step of the sampling as a function of its unconditional embedding. The conditional branch is run once."""

    host: TextHost
    x: Tensor
    goal: Tensor
    sigma: float
    after: float

    def __post_init__(self) -> None:
        self.forwards, self.backwards = len(self.x), 0
        self.cond = self.host.branch(self.x, self.sigma, "cond")

    def uncond(self, embedding: Tensor) -> Tensor:
        """The unconditional branch's x0."""
        self.forwards += len(self.x)
        return self.host.branch(self.x, self.sigma, "uncond", embedding)

    def x0(self, uncond: Tensor) -> Tensor:
        return guided(self.cond, uncond, self.host.cfg)

    def error(self, uncond: Tensor) -> Tensor:
        """Difference of the step's result to the goal, in variance-preserving space."""
        return from_level(ddim_step(self.x, self.x0(uncond), self.sigma, self.after) - self.goal, self.after)

    def loss(self, uncond: Tensor) -> Tensor:
        return self.error(uncond).square().mean()

    def gradient(self, objective: Tensor, leaf: Tensor) -> Tensor:
        """∂objective/∂leaf; one backward pass."""
        self.backwards += len(self.x)
        return torch.autograd.grad(objective, leaf)[0]


@torch.no_grad()
def optimise_null_text(
    host: TextHost,
    trajectory: Tensor,
    sigmas: Tensor,
    settings: NullTextSettings = NullTextSettings(),
    on_step: Callable[[StepReport], None] | None = None,
) -> tuple[Tensor, Tensor, list[StepReport]]:
    """Embeddings with which sampling at the host's cfg follows `trajectory` [N+1, 1, C, h, w] (noise first, VE space).

    Returns the path as sampled [N+1, 1, C, h, w], the embeddings [N, 1, L, D] (float32, CPU) and a report of each step.
    Raises FloatingPointError where the model, or the optimisation, gave NaN or infinite values.
    """
    solve = _Fast(host) if settings.optimiser == "fast" else _Published(host)
    levels, total = sigmas.tolist(), len(sigmas) - 1
    x = trajectory[0].to(host.device)
    path, found, reports = [x.cpu()], [], []
    for index in range(total):
        step = _Step(host, x, trajectory[index + 1].to(host.device), levels[index], levels[index + 1])
        embedding, uncond = solve(step, index, total, settings)
        x0 = step.x0(uncond)
        x = ddim_step(x, x0, step.sigma, step.after)
        check_finite(x, f"step {index + 1} of the null-text optimisation")
        path.append(x.cpu())
        found.append(embedding.cpu())
        reports.append(
            StepReport("sample", index, total, x, x0, float(step.loss(uncond)), step.forwards, step.backwards)
        )
        if on_step is not None:
            on_step(reports[-1])
    return torch.stack(path), torch.stack(found), reports


class _Published:
    """The published loop: Adam from the embedding of the step before, from the negative prompt's at first."""

    def __init__(self, host: TextHost) -> None:
        self.embedding = host.null.detach().clone()

    def __call__(self, step: _Step, index: int, total: int, settings: NullTextSettings) -> tuple[Tensor, Tensor]:
        """The embedding for step number `index` of `total`, and the unconditional x0 with it."""
        leaf = self.embedding.clone().requires_grad_()
        # At 100 steps the published rate reaches 0; beyond, it stays there.
        adam = torch.optim.Adam([leaf], lr=settings.lr * max(1 - index / 100, 0))
        for _ in range(settings.inner_steps):
            with torch.enable_grad():
                loss = step.loss(step.uncond(leaf))
            leaf.grad = step.gradient(loss, leaf)
            adam.step()
            if loss.item() < settings.tolerance(index, total):
                break
        self.embedding = leaf.detach()
        return self.embedding, step.uncond(self.embedding)


class _Fast:
    """Reaches the published loop's tolerance with few evaluations.

    Where it starts: with the source prompt's embedding both branches are equal, so what is left is the inversion's own
    error (Miyake et al. 2023), most often below the tolerance already. Otherwise the better of it and of the embedding
    found last.
    How it goes on: the error r(e) is small and smooth, a least-squares problem. Conjugate gradients (Polak and
    Ribière) with the Gauss-Newton length along a direction d, -⟨r, J·d⟩ / ⟨J·d, J·d⟩. J·d is what r changes by on the
    way to the trial point, which has to be evaluated anyway; the length found is the next one's trial.
    """

    def __init__(self, host: TextHost) -> None:
        self.source = self.found = host.positive.detach().clone()
        self.length: float | None = None

    def __call__(self, step: _Step, index: int, total: int, settings: NullTextSettings) -> tuple[Tensor, Tensor]:
        """The embedding for step number `index` of `total`, and the unconditional x0 with it."""
        tolerance = settings.tolerance(index, total)
        uncond = step.uncond(self.source)
        loss = step.loss(uncond)
        if loss <= tolerance:
            return self.source, uncond
        start = self.source
        if self.found is not self.source and step.loss(step.uncond(self.found)) < loss:
            start = self.found
        point, gradient, direction = _Point(step, start), None, None
        for _ in range(settings.inner_steps):
            if point.loss <= tolerance:
                break
            before, gradient = gradient, point.gradient()
            direction = _conjugate(gradient, before, direction)
            better = self._along(point, direction)
            if better is None:
                break
            point, gained = better, 1 - better.loss / point.loss
            if gained < WORTHWHILE:
                break
        self.found = point.embedding
        return point.embedding, point.uncond

    def _along(self, point: _Point, direction: Tensor) -> _Point | None:
        """The point that a Gauss-Newton step along `direction` leads to; None where it is no better."""
        size = float(direction.norm())
        if not 0 < size < math.inf:
            return None
        # Nothing is known about the first length; a hundredth of the embedding is seen in fp16 too.
        length = self.length or 0.01 * float(point.embedding.norm()) / size
        trial = point.moved(length * direction)
        change = trial.residual - point.residual
        curvature = float(change.square().sum())
        if not math.isfinite(curvature):
            ratio = 0.1
        elif curvature == 0:
            ratio = 10.0
        else:
            ratio = min(max(-float((point.residual * change).sum()) / curvature, 0.1), 10.0)
        self.length = length * ratio
        if not (trial.loss < point.loss and 0.5 < ratio < 2):
            trial.forget()
            again = point.moved(self.length * direction)
            # Not min(): a loss may be NaN.
            trial = again if again.loss < trial.loss or math.isnan(trial.loss) else trial
        return trial if trial.loss < point.loss else None


class _Point:
    """The step at one embedding, ready for a gradient.

    `residual` is the step's error in units of the noise that the unconditional branch predicts, so lengths carry over
    from step to step.
    """

    def __init__(self, step: _Step, embedding: Tensor) -> None:
        self.step, self.embedding = step, embedding
        self._look()
        self.loss = float(self.residual.square().mean()) * self._unit**2

    @property
    def _unit(self) -> float:
        step = self.step
        return (step.host.cfg - 1) * (step.sigma - step.after) / (1 + step.after**2) ** 0.5

    def _look(self) -> None:
        self._leaf = self.embedding.clone().requires_grad_()
        with torch.enable_grad():
            uncond = self.step.uncond(self._leaf)
            residual = self.step.error(uncond) / self._unit
            self._objective: Tensor | None = residual.square().sum() / 2
        self.uncond, self.residual = uncond.detach(), residual.detach()

    def gradient(self) -> Tensor:
        if self._objective is None:
            self._look()
        assert self._objective is not None, "_look sets it"
        gradient = self.step.gradient(self._objective, self._leaf)
        self.forget()
        return gradient

    def forget(self) -> None:
        """Frees the model's activations: never two points have theirs."""
        self._objective = None

    def moved(self, by: Tensor) -> _Point:
        return _Point(self.step, self.embedding + by)


def _conjugate(gradient: Tensor, before: Tensor | None, direction: Tensor | None) -> Tensor:
    """The next direction, downhill always (Polak and Ribière 1969)."""
    if before is None or direction is None:
        return -gradient
    share = ((gradient * (gradient - before)).sum() / before.square().sum()).clamp(min=0)
    direction = share * direction - gradient
    return direction if (direction * gradient).sum() < 0 else -gradient
