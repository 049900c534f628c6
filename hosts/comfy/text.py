"""ComfyUI as a text host: its branches one by one, guidance with an embedding in the negative's place, attention.

See `TextHost`. A run is one of `comfy_host.run`: inside a CFGGuider, on a private clone, with the caller's MODEL and
CONDITIONING left as they are.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from uuid import uuid4

import comfy.conds
import comfy.model_management
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...protocols.diffusion import Prediction
from ...protocols.text import AttentionHandler, Branch, TextHost
from .attention import AttentionAccess, check_text_model
from .host import ComfyHost, rows_of, run

Result = TypeVar("Result")
Cond = dict[str, Any]

NAMES: dict[Branch, str] = {"cond": "positive", "uncond": "negative"}
TEXT = "c_crossattn"


@dataclasses.dataclass
class ComfyTextHost(ComfyHost):
    """A ComfyUI MODEL, its conditioning and its VAE during one run. See `TextHost`; made by `run_text`."""

    _access: AttentionAccess | None = None

    def __post_init__(self) -> None:
        for name in NAMES.values():
            self.guider.conds[name] = [self._own(cond) for cond in self.guider.conds[name]]
            if not any(TEXT in cond["model_conds"] for cond in self.guider.conds[name]):
                raise ValueError(f"{name} holds no text: connect the CONDITIONING of a text encode node to it.")

    @property
    def cfg(self) -> float:
        return self.guider.cfg

    @property
    def positive(self) -> Tensor:
        return self._embedding("cond")

    @property
    def null(self) -> Tensor:
        return self._embedding("uncond")

    def encode(self, image: Tensor) -> Tensor:
        self._need_vae()
        return super().encode(image)

    def decode(self, x0: Tensor) -> Tensor:
        self._need_vae()
        return super().decode(x0)

    def predict(self, x: Tensor, sigma: float) -> Prediction:
        """See `DiffusionHost.predict`: with guidance."""
        return Prediction(self.guided(x, sigma))

    def branch(self, x: Tensor, sigma: float, branch: Branch, embedding: Tensor | None = None) -> Tensor:
        """See `TextHost.branch`.

        Raises ValueError where the branch's conditioning is not active at `sigma`, and where it is several at once and
        an embedding is given.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not self._active(branch, sigma):
            raise ValueError(f"{NAMES[branch]} has no entry that is active at sigma {sigma:.3f}: give one for all.")
        conds = self._replaced(branch, sigma, embedding)
        # The other branch's place stays empty: ComfyUI tells them apart by it.
        both = [conds, None] if branch == "cond" else [None, conds]
        scale = _Scale(self._half, sigma)
        x, both = scale.enter(x), [_entered(part, scale) for part in both]
        with self._step([branch]) as options:
            made = comfy.samplers.calc_cond_batch(self._model, both, x, rows_of(sigma, x), options)
        return scale.leave(made[0 if branch == "cond" else 1].float())

    def guided(self, x: Tensor, sigma: float, null: Tensor | None = None) -> Tensor:
        """See `TextHost.guided`.

        Raises ValueError where the negative conditioning is several at once and `null` is given.
        """
        scale = _Scale(self._half, sigma)
        expected: list[Branch] = [branch for branch in NAMES if self._active(branch, sigma)]
        if math.isclose(self.cfg, 1):
            expected = [branch for branch in expected if branch == "cond"]
        before = self.guider.conds
        self.guider.conds = {**before, "negative": _entered(self._replaced("uncond", sigma, null), scale)}
        try:
            with self._step(expected) as options:
                return scale.leave(self.evaluate(scale.enter(x), sigma, options).float())
        finally:
            self.guider.conds = before

    @contextlib.contextmanager
    def attention(self, handler: AttentionHandler) -> Iterator[None]:
        """See `TextHost.attention`.

        Raises UnsupportedModel for what does not compose, naming it, and RuntimeError where a handler is in place
        already.
        """
        if self._access is not None:
            raise RuntimeError("a handler is in place already; leave its `with` block first")
        access = AttentionAccess(handler, self.guider.model_patcher)
        with access.attached():
            self._access = access
            try:
                yield
            finally:
                self._access = None

    def together(self, source: TextHost, pictures: int) -> ComfyTextHost | None:
        """See `TextHost.together`; None too where another pack has put something that acts on the MODEL: it may keep a
        state from one evaluation to the next."""
        if not isinstance(source, ComfyTextHost) or source.cfg != self.cfg:
            return None
        if not same_weights(source.guider.model_patcher, self.guider.model_patcher):
            return None
        if not all(_is_data(host.extra_args["model_options"]) for host in (source, self)):
            return None
        guider = copy.copy(self.guider)
        guider.conds = {}
        for name in NAMES.values():
            joined = _joined(source.guider.conds[name], self.guider.conds[name], pictures)
            if joined is None:
                return None
            guider.conds[name] = [joined]
        return dataclasses.replace(self, guider=guider, _access=None)

    @property
    def _half(self) -> bool:
        manual = self._model.manual_cast_dtype
        return (self._model.get_dtype() if manual is None else manual) == torch.float16

    @contextlib.contextmanager
    def _step(self, expected: list[Branch]) -> Iterator[dict[str, Any]]:
        if self._access is None:
            yield self._options()
            return
        branches: dict[Any, Branch] = {
            cond["uuid"]: branch for branch, name in NAMES.items() for cond in self.guider.conds[name]
        }
        with self._access.step(self._options(), branches, expected) as options:
            yield options

    @staticmethod
    def _own(cond: Cond) -> Cond:
        """An entry with an id of its own: ComfyUI gives areas that it adds to one branch the id from the other."""
        text = cond["model_conds"].get(TEXT)
        if type(text) is comfy.conds.CONDCrossAttn:
            cond = {**cond, "model_conds": {**cond["model_conds"], TEXT: _OwnLength(text.cond)}}
        return {**cond, "uuid": uuid4()}

    def _active(self, branch: Branch, sigma: float) -> list[Cond]:
        """The entries of a branch's conditioning that ComfyUI uses at σ; both ends of a range are in it."""
        level = torch.tensor(float(sigma), dtype=torch.float32)  # compared as ComfyUI does, edges included
        return [
            cond
            for cond in self.guider.conds[NAMES[branch]]
            if not level > cond.get("timestep_start", float("inf")) and not level < cond.get("timestep_end", 0.0)
        ]

    def _embedding(self, branch: Branch) -> Tensor:
        """[1, L, D] of a branch's first entry with text."""
        conds = self.guider.conds[NAMES[branch]]
        return next(cond["model_conds"][TEXT].cond for cond in conds if TEXT in cond["model_conds"])[:1].float()

    def _replaced(self, branch: Branch, sigma: float, embedding: Tensor | None) -> list[Cond]:
        conds = self.guider.conds[NAMES[branch]]
        if embedding is None:
            return conds
        active = self._active(branch, sigma)
        if len(active) != 1:
            raise ValueError(
                f"{NAMES[branch]} has {len(active)} entries that are active at sigma {sigma:.3f}; a text embedding can "
                "stand in for one alone. Give one prompt, without areas or masks."
            )
        cond = active[0]
        kind = _Alone if isinstance(cond["model_conds"].get(TEXT), _Alone) else _OwnLength
        text = kind(embedding.to(self.device))
        return [{**cond, "model_conds": {**cond["model_conds"], TEXT: text}}]

    def _need_vae(self) -> None:
        if self.vae is None:
            raise ValueError("This needs the VAE that belongs to the MODEL: connect it.")


def run_text(
    model: Any,
    vae: Any | None,
    positive: Any,
    negative: Any,
    cfg: float,
    noise: Tensor,
    seed: int,
    body: Callable[[ComfyTextHost], Result],
    *,
    gradients: bool = False,
) -> Result:
    """Runs `body(host)` with everything loaded on ComfyUI's device and returns what it returns.

    vae: None where `body` neither encodes nor decodes.
    positive, negative: CONDITIONING with text. noise: [B, C, h, w]; says how large the run is.
    gradients: whether `body` differentiates.

    Raises UnsupportedModel for a MODEL that is not a text-conditioned UNet with a noise schedule, or on which
    another pack leaves passes out. The caller's MODEL and CONDITIONING stay as they are, also after an error or an
    interrupt.
    """
    check_text_model(model)
    for name, given in (("positive", positive), ("negative", negative)):
        if not given:
            raise ValueError(f"{name} is empty: connect the CONDITIONING of a text encode node to it.")

    def with_text(host: ComfyHost) -> Result:
        return body(ComfyTextHost(host.guider, host.vae, host.extra_args, host.device, host.downscale))

    return run(model, vae, positive, negative, cfg, noise, seed, with_text, gradients=gradients)


class _OwnLength(comfy.conds.CONDCrossAttn):
    """A text embedding that shares a pass with those of its own length alone.

    ComfyUI would repeat the shorter of two to the length of both, which the picture does not show, but a token's map
    does.
    """

    def can_concat(self, other: comfy.conds.CONDCrossAttn) -> bool:
        return self.cond.shape[1:] == other.cond.shape[1:] and super().can_concat(other)


class _Alone(_OwnLength):
    """A text embedding that shares a pass with no other conditioning."""

    def can_concat(self, other: comfy.conds.CONDCrossAttn) -> bool:
        return False


# Two hosts in one ---------------------------------------------------------------------------------------------------


def same_weights(one: Any, other: Any) -> bool:
    """Whether two MODELs are the same network with the same changes to it."""
    return (
        one.model is other.model
        and one.patches_uuid == other.patches_uuid
        and not one.injections
        and not other.injections
        and one.object_patches.keys() == other.object_patches.keys()
        and all(one.object_patches[key] is other.object_patches[key] for key in one.object_patches)
    )


def _is_data(value: Any) -> bool:
    """Whether nested options hold nothing that acts."""
    if isinstance(value, dict):
        return all(map(_is_data, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    return value is None or isinstance(value, (bool, int, float, str, Tensor, torch.dtype, torch.device))


def _joined(source: list[Cond], target: list[Cond], pictures: int) -> Cond | None:
    """One entry for the rows of both, where each has one alone and they differ in their texts at most."""
    if len(source) != 1 or len(target) != 1:
        return None
    one, other = source[0], target[0]
    if one.get("control") is not None or one.get("hooks") is not None:
        return None
    made = one["model_conds"], other["model_conds"]
    # What the texts went into, beside the ids.
    apart = {"model_conds", "uuid", "cross_attn", "pooled_output"}
    if not _equal({key: one[key] for key in one.keys() - apart}, {key: other[key] for key in other.keys() - apart}):
        return None
    if made[0].keys() != made[1].keys():
        return None
    model_conds = {}
    for key, ours in made[0].items():
        theirs = made[1][key]
        if type(ours) is not type(theirs):
            return None
        if type(ours) in _BY_ROW and ours.cond.shape[1:] == theirs.cond.shape[1:]:
            rows = torch.cat([comfy.utils.repeat_to_batch_size(part.cond, pictures) for part in (ours, theirs)])
            model_conds[key] = _Alone(rows) if key == TEXT else type(ours)(rows)
        elif key != TEXT and _equal(ours.cond, theirs.cond):
            model_conds[key] = ours
        else:
            return None
    return {**one, "model_conds": model_conds}


_BY_ROW = (_OwnLength, comfy.conds.CONDRegular, comfy.conds.CONDNoiseShape)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
    return one is other or (type(one) is type(other) and isinstance(one, (bool, int, float, str)) and one == other)


# Gradients of half-precision weights ---------------------------------------------------------------------------------


class _Scale:
    """Keeps gradients within float16's range inside a model: a power of two that comes on where the backward pass
    enters, and off where it leaves.

    active: whether the model computes in float16. sigma: by how much x0 enlarges the model's output.
    """

    def __init__(self, active: bool, sigma: float) -> None:
        self.active = active and torch.is_grad_enabled()
        self.enlarged = max(float(sigma), 1.0)
        self.factor: Tensor | None = None

    def enter(self, tensor: Tensor) -> Tensor:
        """Where `tensor` goes into the model."""
        return _Off.apply(tensor, self) if self.active else tensor

    def leave(self, tensor: Tensor) -> Tensor:
        """Where `tensor` comes out of the model."""
        return _On.apply(tensor, self) if self.active else tensor


class _On(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: _Scale) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        largest = gradient.abs().amax() * ctx.scale.enlarged
        power = torch.where(largest > 0, -largest.log2().floor(), torch.zeros_like(largest)).clamp(-60, 60)
        ctx.scale.factor = power.nan_to_num(0.0).exp2()
        return gradient * ctx.scale.factor, None


class _Off(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: _Scale) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.scale.factor, None


def _entered(conds: list[Cond] | None, scale: _Scale) -> list[Cond] | None:
    """Conditioning whose text embedding goes into the model through `scale`."""
    if conds is None or not scale.active:
        return conds
    return [
        {**cond, "model_conds": {**cond["model_conds"], TEXT: _OwnLength(scale.enter(cond["model_conds"][TEXT].cond))}}
        if TEXT in cond["model_conds"]
        else cond
        for cond in conds
    ]
