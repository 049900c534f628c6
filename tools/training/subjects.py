"""The judge of the demo subjects: a plain convolutional network. It took part in no learning and in no score.

"None" is what it has to say of the world's own objects, of mixtures of a subject and another object, of a subject's
outline in other colours, of its colours in another outline, of what is too blurred to be told, and of half a subject.
What a latent model can do no better stays the subject: a soft border between the tones, white that takes the ground's
colour, small warps, blur and noise.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...demo import subjects, world
from ...demo.judges import shapes as judge, subjects as subject_judge
from ...demo.subjects import LOOKS, SUBJECTS, TONES, Subject
from .common import Run, fit, half, write_json, write_weights
from .judge import blob

SCENE_SEED = 700_001
SIDE = world.SIZE


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture [SIZE, SIZE, 3] (0..255), what the judge should say, where to look, and the blur it gets after cropping
    (standard deviation in pixels of the crop)."""

    picture: np.ndarray
    answer: str
    pose: world.Thing
    blur: float = 0.0


def over(ground: np.ndarray, alpha: np.ndarray, surface: np.ndarray) -> np.ndarray:
    return ground * (1 - alpha[..., None]) + surface * alpha[..., None]


def tolerable(subject: Subject, pose: world.Thing, ground: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The subject on a ground [SIZE, SIZE, 3], as loosely drawn as it may be and still be the subject."""
    first, second = (np.array(TONES[tone], np.float32) + rng.normal(0, 8, 3) for tone in subject.tones)
    if subject.tones[1] == "white":
        second = second + rng.uniform(0, 1) * (ground - second)
    share = subjects.inside(subject.second, pose, rng.choice([1.0, rng.uniform(1, 6)]))[..., None]
    alpha = subjects.inside(subject.outline, pose, rng.uniform(0.8, 2.2))
    return over(ground, alpha, first * (1 - share) + second * share)


def thing_picture(ground: np.ndarray, thing: world.Thing) -> np.ndarray:
    return over(ground, world.coverage(thing), world.paint(thing))


def side_of(pose: world.Thing, rng: np.random.Generator) -> np.ndarray:
    """One side of a line through about the middle of an object: float32 [SIZE, SIZE] in 0..1."""
    angle, offset = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.12)
    return subjects.inside(lambda u, v: u * np.cos(angle) + v * np.sin(angle) - offset, pose, rng.uniform(1, 4))


def other_tones(subject: Subject, rng: np.random.Generator) -> tuple[str, str]:
    """Tones in which the subject is another thing: swapped, one for both, or another in place of one or both."""
    first, second = subject.tones
    choices = [name for name in world.COLOURS if name not in subject.tones]
    new, newer = (str(name) for name in rng.choice(choices, 2, replace=False))
    options = [(second, first), (first, first), (new, second), (first, new), (new, newer), (new, new)]
    return options[rng.integers(len(options))]


def sample(index: int) -> Sample:
    """The sample of a number, always the same."""
    rng = np.random.default_rng((SCENE_SEED, index))
    pose = world.random_thing(rng)
    ground = world.draw(world.Scene(world.random_ground(rng), ())).astype(np.float32)
    name = str(rng.choice(list(SUBJECTS)))
    subject, way, none = SUBJECTS[name], rng.uniform(), judge.NONE
    drawn = tolerable(subject, pose, ground, rng)
    if way < 0.48:
        return Sample(drawn, name, pose, rng.choice([0.0, rng.uniform(0, 1.3)]))
    if way < 0.68:
        return Sample(thing_picture(ground, pose), none, pose, rng.choice([0.0, rng.uniform(0, 2)]))
    if way < 0.74:  # half a subject, the rest a world object, another subject, or nothing
        stranger = SUBJECTS[str(rng.choice([other for other in SUBJECTS if other != name]))]
        rest = (thing_picture(ground, pose), tolerable(stranger, pose, ground, rng), ground)[rng.integers(3)]
        return Sample(over(rest, side_of(pose, rng), drawn), none, pose)
    if way < 0.80:  # one shining through the other
        share = np.full((SIDE, SIDE), rng.uniform(0.35, 0.65), np.float32)
        return Sample(over(thing_picture(ground, pose), share, drawn), none, pose)
    if way < 0.87:
        disguised = dataclasses.replace(subject, tones=other_tones(subject, rng))
        return Sample(tolerable(disguised, pose, ground, rng), none, pose)
    if way < 0.93:  # its colours in another outline, of the world
        shapes = [shape for shape in world.SHAPES if not (name in LOOKS and shape == subject.kind)]
        pose = dataclasses.replace(pose, shape=str(rng.choice(shapes)))
        share = subjects.inside(subject.second, pose)[..., None]
        first, second = (np.array(TONES[tone], np.float32) for tone in subject.tones)
        return Sample(over(ground, world.coverage(pose), first * (1 - share) + second * share), none, pose)
    if way < 0.96:
        return Sample(drawn, none, pose, rng.uniform(5, 8))
    if way < 0.98:
        return Sample(ground, none, pose)
    return Sample(blob(rng).astype(np.float32), none, dataclasses.replace(pose, x=SIDE / 2, y=SIDE / 2, radius=14.0))


def blurred(crop: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of [1, 3, H, W]."""
    reach = int(3 * deviation) + 1
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation).square())
    line = (line / line.sum()).expand(3, 1, 1, -1)
    crop = F.conv2d(F.pad(crop, (reach,) * 4, mode="replicate"), line, groups=3)
    return F.conv2d(crop, line.transpose(2, 3), groups=3)


def cropped(one: Sample, rng: np.random.Generator) -> Tensor:
    """The crop [1, 3, judge.CROP, judge.CROP] in -1..1 that the judge sees, looked at loosely."""
    picture = torch.from_numpy(one.picture.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    x, y = one.pose.x + rng.normal(0, 1), one.pose.y + rng.normal(0, 1)
    reach = one.pose.radius * rng.uniform(0.95, 1.1) + rng.uniform(1, 7)
    crop = judge.crop(picture, (x - reach, y - reach, x + reach, y + reach))
    return blurred(crop, one.blur) if one.blur > 0.3 else crop


def warped(batch: Tensor, generator: torch.Generator, reach: float = 0.05) -> Tensor:
    """Smooth warps of crops, by up to about `reach` of their side."""
    coarse = torch.randn(len(batch), 2, 4, 4, generator=generator) * reach
    shift = F.interpolate(coarse, batch.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    plain = F.affine_grid(torch.eye(2, 3).expand(len(batch), -1, -1), list(batch.shape), align_corners=False)
    return F.grid_sample(batch, plain + shift, padding_mode="border", align_corners=False)


def train(run: Run) -> nn.Module:
    def loss(network: nn.Module, indices: np.ndarray, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        samples = [sample(int(index)) for index in indices]
        batch = warped(torch.cat([cropped(one, rng) for one in samples]), generator)
        rough = torch.rand(len(batch), 1, 1, 1, generator=generator)
        noise = torch.randn(batch.shape, generator=generator) * torch.rand(len(batch), 1, 1, 1, generator=generator)
        batch = batch + 0.15 * noise * (rough > 0.6)
        answers = torch.tensor([subject_judge.NAMES.index(one.answer) for one in samples], device=run.device)
        outputs = network(batch.to(run.device))
        right = (outputs.argmax(1) == answers).float().mean()
        return F.cross_entropy(outputs, answers, label_smoothing=0.02), {"right": right.item()}

    def export(average: nn.Module, facts: dict) -> None:
        write_weights(run.out / "subjects" / "model.safetensors", half(average))
        write_json(run.out / "subjects" / "training.json", facts)

    torch.manual_seed(run.seed + 78)
    return fit("subjects", run, subject_judge.Network(), run.samples, loss, export, average=0.995)
