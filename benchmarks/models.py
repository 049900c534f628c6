"""How good are the demo models? The figures of their model cards.

    python run.py bench models [--only clip,reader,judge,lpips,vae,prior,text] [--count 512]

All on scenes that no training saw. Pictures that a model made are judged by the judge network and the palette.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import torch
from torch import Tensor

from ..demo import files, world
from ..demo.judges import shapes as judge
from ..models.clip.guide import ClipGuide
from .edits import demo_guide
from .options import Parser, write_json

SEED = 4_000_000


def unseen(count: int, written: float = 0.0) -> tuple[list[world.Scene], Tensor]:
    """Scenes with one object, which is a word in the share `written` of them, and their pictures [count, 3, H, W] in
    -1..1."""
    scenes = list(itertools.islice(world.scenes(SEED, 1, written), count))
    pixels = np.stack([world.draw(scene) for scene in scenes])
    return scenes, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def share(flags) -> float:
    return round(float(np.mean(list(flags))), 4)


def uint8(pictures: Tensor) -> np.ndarray:
    return ((pictures.clamp(-1, 1) + 1) * 127.5 + 0.5).byte().permute(0, 2, 3, 1).numpy()


def clip(count: int) -> dict:
    return zero_shot(demo_guide("demo"), count)


@torch.no_grad()
def reader(count: int) -> dict:
    """As `clip`, and of words written in place of objects: how often "a red star" fits the word best; and of all pairs
    of a word and an object the share in which the lead of "the word red star" over "a red star" is larger for the
    word."""
    guide = demo_guide("reader")
    scenes, pictures = unseen(count, written=0.5)
    things = [scene.things[0] for scene in scenes]
    images = torch.cat([guide.embed_image(part) for part in pictures.split(64)])
    names = [(s, c) for s in world.SHAPES for c in world.COLOURS]
    best = (images @ guide.embed_text([f"a {c} {s}" for s, c in names]).T).argmax(1).tolist()
    plain, as_word = (
        (images * guide.embed_text([form.format(f"{t.colour} {t.shape}") for t in things])).sum(1)
        for form in ("a {}", "the word {}")
    )
    written = np.array([thing.written for thing in things])
    lead = (as_word - plain).numpy()
    return zero_shot(guide, count) | {
        "words": {
            "similarity of a word": round(float(plain[written].mean()), 3),
            "of an object": round(float(plain[~written].mean()), 3),
            "read": share(names[i] == (t.shape, t.colour) for i, t in zip(best, things, strict=True) if t.written),
            "told from objects": share((lead[written][:, None] > lead[~written]).flatten()),
        },
    }


@torch.no_grad()
def zero_shot(guide: ClipGuide, count: int) -> dict:
    """Zero-shot accuracy among 256 sentences from "a red circle" to "a pink checked moon": whole picture, and the
    object alone on grey."""
    scenes, pictures = unseen(count)
    masks = torch.from_numpy(np.stack([world.edit_mask(scene) for scene in scenes]))[:, None].float()
    results = {}
    for name, seen in (("whole", pictures), ("masked", pictures * masks)):
        images = torch.cat([guide.embed_image(part) for part in seen.split(64)])
        texts = [(s, c, p) for s in world.SHAPES for c in world.COLOURS for p in world.PATTERNS]
        sentences = [f"a {c} {'' if p == 'solid' else p + ' '}{s}" for s, c, p in texts]
        best = (images @ guide.embed_text(sentences).T).argmax(1)
        found = [(texts[i], scene.things[0]) for i, scene in zip(best.tolist(), scenes, strict=True)]
        results[name] = {
            "shape": share(f[0] == t.shape for f, t in found),
            "colour": share(f[1] == t.colour for f, t in found),
            # "a red star" is true of a striped one too, so a pattern is only asked about where there is one.
            "pattern": share(f[2] == t.pattern for f, t in found if t.pattern != "solid"),
        }
    return results


def judges(count: int) -> dict:
    """Accuracy of the judge on clean and on noisy pictures, and how often it sees nothing on empty grounds."""
    scenes, pictures = unseen(count)
    masks = [world.edit_mask(scene) for scene in scenes]
    results = {}
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(SEED))
    for name, seen in (("clean", pictures), ("noise_0.08", pictures + 0.16 * noise)):
        found = [(judge.judge(p, m), s.things[0]) for p, m, s in zip(uint8(seen), masks, scenes, strict=True)]
        results[name] = {
            key: share(getattr(f, key) == getattr(t, key) for f, t in found) for key in ("shape", "colour", "pattern")
        }
        results[name]["palette"] = share(f.palette == t.colour for f, t in found)
    empty = [world.draw(world.Scene(s.ground, ())) for s in scenes]
    results["none_on_empty"] = share(judge.judge(p, m).shape == judge.NONE for p, m in zip(empty, masks, strict=True))
    return results


@torch.no_grad()
def vae(count: int) -> dict:
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(files.TEXT / "vae", torch_dtype=torch.float32).eval()
    scenes, pictures = unseen(count)
    made = torch.cat([network.decode(network.encode(part).latent_dist.mode()).sample for part in pictures.split(64)])
    error = (made.clamp(-1, 1) - pictures).square().mean((1, 2, 3)) / 4
    found = [(judge.judge(p, world.edit_mask(s)), s.things[0]) for p, s in zip(uint8(made), scenes, strict=True)]
    return {
        "psnr": round(float((-10 * error.log10()).mean()), 2),
        "shape": share(f.shape == t.shape for f, t in found),
        "pattern": share(f.pattern == t.pattern for f, t in found),
    }


@torch.no_grad()
def prior(count: int) -> dict:
    """How many unconditional samples (DDIM, 50 steps) hold an object that the judge names with certainty."""
    from ..diffusion.schedule import Schedule, guided_ddim_step
    from ..hosts.diffusers.host import DiffusersHost

    host = DiffusersHost.from_prior(files.PRIOR)
    schedule = Schedule.respaced(host.train_sigmas, 50)
    x = torch.randn(count, 3, world.SIZE, world.SIZE, generator=torch.Generator().manual_seed(SEED))
    for index in reversed(range(50)):
        x = guided_ddim_step(
            schedule, x, host.predict(x / schedule.alpha(index) ** 0.5, schedule.sigma(index)).x0, None, index
        )
    everywhere = np.ones((world.SIZE, world.SIZE), bool)
    found = [judge.judge(picture, everywhere) for picture in uint8(x)]
    return {
        "named": share(f.shape != judge.NONE for f in found),
        "named_with_certainty_0.9": share(f.shape != judge.NONE and f.shape_certainty > 0.9 for f in found),
    }


@torch.no_grad()
def text(count: int, cfg: float = 6.0) -> dict:
    """Do pictures made from a caption (DDIM, 50 steps) show the object that it names?"""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(files.TEXT, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    scenes, _ = unseen(count)
    made = []
    for start in range(0, count, 32):
        prompts = [scene.caption() for scene in scenes[start : start + 32]]
        made.append(
            pipeline(
                prompts,
                num_inference_steps=50,
                guidance_scale=cfg,
                output_type="np",
                height=64,
                width=64,
                generator=torch.Generator().manual_seed(SEED + start),
            ).images
        )
    everywhere = np.ones((world.SIZE, world.SIZE), bool)
    found = [
        (judge.judge((p * 255 + 0.5).astype(np.uint8), everywhere), s.things[0])
        for p, s in zip(np.concatenate(made), scenes, strict=True)
    ]
    return {
        "cfg": cfg,
        "shape": share(f.shape == t.shape for f, t in found),
        "colour": share(f.palette == t.colour for f, t in found),
        "pattern": share(f.pattern == t.pattern for f, t in found),
    }


@torch.no_grad()
def lpips(count: int) -> dict:
    """How often LPIPS finds the stronger of two distortions of a picture the more different one."""
    from torch.nn import functional as F

    from ..models.lpips import Perceptual

    perceptual = Perceptual("demo", files.LPIPS)
    scenes, pictures = unseen(count)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(SEED))

    def blurred(shrink: int) -> Tensor:
        return F.interpolate(F.avg_pool2d(pictures, shrink), scale_factor=float(shrink), mode="bilinear")

    def drawn(**changes) -> Tensor:
        pixels = np.stack([world.draw(scene.replace(0, **changes)) for scene in scenes])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

    def distance(other: Tensor) -> Tensor:
        return torch.cat([perceptual(a, b) for a, b in zip(pictures.split(64), other.split(64), strict=True)])

    pairs = {
        "noise": (pictures + 0.05 * noise, pictures + 0.2 * noise),
        "blur": (blurred(2), blurred(4)),
        "object": (pictures + 0.02 * noise, drawn(shape="ring", colour="cyan")),
    }
    return {name: share((distance(mild) < distance(strong)).tolist()) for name, (mild, strong) in pairs.items()}


MEASURES = {"clip": clip, "reader": reader, "judge": judges, "lpips": lpips, "vae": vae, "prior": prior, "text": text}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("models", __doc__)
    parser.add_argument("--only", default=",".join(MEASURES))
    parser.add_argument("--count", type=int, default=512)
    options = parser.read(arguments)
    results = {}
    for name in parser.names(options.only, MEASURES, "model"):
        results[name] = MEASURES[name](options.count)
        print(name, json.dumps(results[name]), flush=True)
    write_json(options.out / "models.json", results)
