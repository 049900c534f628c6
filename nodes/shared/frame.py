"""Where a picture that a VAE decoded lies in the picture that went into it."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor
from torch.nn import functional as F

from .convert import paste_into, split_alpha, to_bchw

LARGEST_MULTIPLE = 32
"""The largest step in pixels to which a VAE of pictures cuts their sides."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where a decoded picture of `inner` (height, width) lies in the source picture of `size`.

    ComfyUI cuts a picture's sides to the VAE's multiple, in the middle, before it encodes: `top` and `left` are what it
    cuts off there. A picture that was resized before is resized back: `resized`.
    """

    size: tuple[int, int]
    inner: tuple[int, int]
    top: int = 0
    left: int = 0
    resized: bool = False

    @classmethod
    def cut_from(cls, size: tuple[int, int], inner: tuple[int, int], multiple: int | None = None) -> Frame | None:
        """The frame of what a VAE of that `multiple` cuts from a picture of `size`; None where it does not cut `inner`.

        multiple None: any power of 2 that `inner` is a result of.
        """
        common = math.gcd(*inner)
        multiple = multiple or min(common & -common, LARGEST_MULTIPLE)
        rest = tuple(whole - part for whole, part in zip(size, inner, strict=True))
        if all(0 <= one < multiple for one in rest):
            return cls(size, inner, rest[0] // 2, rest[1] // 2)
        return None

    @property
    def cuts(self) -> bool:
        """Whether something of the source is not in the decoded picture."""
        return not self.resized and self.inner != self.size

    def words(self) -> str:
        """For a report."""
        (height, width), (inner, across) = self.size, self.inner
        place = f"({self.left}, {self.top}) of {width}×{height}"
        return f"the result of {across}×{inner} pixels lies at {place}, as a VAE cuts it"

    def cut(self, mask: Tensor) -> Tensor:
        """The part of a mask [..., H, W] at the source's size that the model sees; one of another size as it is."""
        if self.resized or tuple(mask.shape[-2:]) != self.size:
            return mask
        return mask[..., self.top : self.top + self.inner[0], self.left : self.left + self.inner[1]]

    def embedded(self, mask: Tensor) -> Tensor:
        """A mask [B, 1, h, w] of the decoded picture at the source's size, [B, 1, H, W]; 0 where that was cut off."""
        right, below = (
            whole - part - before
            for whole, part, before in zip(self.size[::-1], self.inner[::-1], (self.left, self.top), strict=True)
        )
        return F.pad(mask, (self.left, right, self.top, below))

    def view(self, image: Tensor) -> Tensor:
        """The colours of the source picture [B, H, W, C] as the model sees them, [B, h, w, 3]."""
        colours = split_alpha(image)[0].float().cpu()
        if not self.resized:
            return colours[:, self.top : self.top + self.inner[0], self.left : self.left + self.inner[1]]
        colours = colours.movedim(-1, 1)
        made = F.interpolate(colours, self.inner, mode="bicubic", antialias=True, align_corners=False)
        return made.clamp(0, 1).movedim(1, -1)

    def place(self, image: Tensor, decoded: Tensor) -> Tensor:
        """`decoded` [B, 3, h, w] in -1..1 at the source's size; what was cut off is `image`'s, [1 or B, H, W, C]."""
        if self.resized:
            made = F.interpolate(decoded, self.size, mode="bicubic", antialias=True, align_corners=False)
            return made.clamp(-1, 1)
        whole = to_bchw(split_alpha(image)[0]).to(decoded).expand(len(decoded), -1, -1, -1).clone()
        whole[..., self.top : self.top + self.inner[0], self.left : self.left + self.inner[1]] = decoded
        return whole


def exact_background(image: Tensor, decoded: Tensor, masks: Tensor, frame: Frame, match_border: bool = False) -> Tensor:
    """`decoded` [B, h, w, C] in 0..1 pasted into `image` [1 or B, H, W, C]: outside of `masks` each pixel is the
    image's, bit for bit; `match_border` keeps the border from showing.

    masks: [1 or B, 1, H, W] in 0..1, of the image's size.

    Raises ValueError for numbers of pictures that do not belong together.
    """
    if len(image) not in (1, len(decoded)):
        raise ValueError(f"image holds {len(image)} pictures for {len(decoded)} results: give one, or one for each")
    if frame.cuts:  # what the model did not see stays
        masks = frame.embedded(frame.cut(masks))
    image = image.expand(len(decoded), -1, -1, -1)
    placed = frame.place(image, to_bchw(decoded, "result"))
    return paste_into(image, placed, masks.expand(len(decoded), -1, -1, -1), match_border)
