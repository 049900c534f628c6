"""What the nodes that learn a concept share: references, files, and a training with progress, checkpoint and report."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ...images.masks import plain_mask
from ..shared import folders  # noqa: F401  (registers output/concepts)
from ..shared.convert import split_alpha, to_bchw, to_bhwc
from ..shared.inputs import aliases
from ..shared.sockets import ConceptReferencesIO, TrainingOptionsIO
from ..swap.invert import say
from .options import TrainingOptions

if TYPE_CHECKING:
    from ...concepts.class_pictures import ClassPictures, Kept
    from ...concepts.references import PreparedReferences
    from ...concepts.settings import TrainSettings
    from ...concepts.trainer import LearnResult, StepReport
    from ...hosts.comfy.learner.learner import ComfyLearner
    from ...protocols.learner import Learned, Precision

logger = logging.getLogger(__name__)

FOLDER, CLASS_FOLDER = "concepts", "class_pictures"
PREVIEW_SIDE = 512
INTERRUPTED = "_interrupted"

Reference = tuple[Tensor, Tensor | None]
"""A picture [3, H, W] in -1..1 and its mask [H, W] in 0..1, or None: of such is a CONCEPT_REFERENCES socket's tuple."""


# References -----------------------------------------------------------------------------------------------------------


class ConceptReferences(io.ComfyNode):
    """Collect reference pictures of several sizes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptReferences",
            display_name="Concept References",
            category="BlendSwap/concept",
            **aliases("training images", "dataset", "reference images", "dreambooth"),
            description="Adds pictures, with masks if you like, to the references that a concept is learned from. An "
            "IMAGE batch has one size: chain one of these for each size.",
            inputs=[
                io.Image.Input("images", tooltip="Pictures of the subject, one or a batch."),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Where the subject is (white): one for each picture, or one for all. The rest is "
                    "not learned. Without it the alpha of images with 4 channels. Load Image's and Split "
                    "Image with Alpha's mask is white where a picture is transparent: put InvertMask between.",
                ),
                ConceptReferencesIO.Input("references", optional=True, tooltip="The Concept References before this."),
            ],
            outputs=[
                ConceptReferencesIO.Output(
                    display_name="references", tooltip="For a learning node, or the next Concept References."
                )
            ],
        )

    @classmethod
    def execute(
        cls, images: Tensor, masks: Tensor | None = None, references: tuple[Reference, ...] | None = None
    ) -> io.NodeOutput:
        return io.NodeOutput(gathered(images, masks, references))


def reference_inputs() -> list[Any]:
    return [
        io.Image.Input(
            "images",
            optional=True,
            tooltip="References of the subject, 3 to 20, on different grounds. Pictures of other sizes go "
            "through Concept References.",
        ),
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip="Where the subject is in images (white): one for each, or one for all. Only there is it "
            "learned. Without it the alpha of images with 4 channels. Load Image's and Split Image with "
            "Alpha's mask is white where a picture is transparent: put InvertMask between.",
        ),
        ConceptReferencesIO.Input(
            "references",
            optional=True,
            tooltip="References of any sizes (Concept References), beside images or instead.",
        ),
    ]


def class_input() -> Any:
    return io.MultiType.Input(
        "class_pictures",
        types=[io.Image, ConceptReferencesIO],
        optional=True,
        tooltip="Pictures of your own of the class, an image batch or Concept References: then none are made, and "
        "class_images does not count.",
    )


def gathered(
    images: Tensor | None, masks: Tensor | None, references: tuple[Reference, ...] | None
) -> tuple[Reference, ...]:
    """References of both kinds of socket in one; private copies.

    Where pictures have an alpha channel and no masks, the alpha is the mask: what is transparent is not learned.

    Raises ValueError for none, and for masks that do not belong to them.
    """
    if images is None:
        if masks is not None:
            raise ValueError("masks is connected, but images is not: connect the pictures that the masks are of")
        if not references:
            raise ValueError(
                "there is no reference picture: connect 3 to 20 pictures of the subject to images (or references)"
            )
        return tuple(references)
    alpha = split_alpha(images, "images")[1]
    if masks is None and alpha is not None and not (alpha == 1).all():
        logger.info("images has an alpha channel, and masks is not connected: what is transparent is not learned.")
        masks = alpha[..., 0]
    if masks is not None:
        masks = plain_mask(masks, "masks")
        if len(masks) not in (1, len(images)):
            raise ValueError(
                f"masks is {list(masks[:, 0].shape)}: give one for all of the {len(images)} pictures, or one for each"
            )
    with torch.inference_mode(False), torch.no_grad():
        pictures = to_bchw(images.clone(), "images").cpu()
        own = [None] * len(pictures)
        if masks is not None:
            own = list(masks[:, 0].detach().clone().cpu().expand(len(pictures), -1, -1))
        return (*(references or ()), *zip(pictures, own, strict=True))


def given_class(pictures: Tensor | tuple[Reference, ...] | None) -> tuple[Tensor, ...]:
    """Pictures of the class from either kind of socket, [3, H, W] in -1..1 each; private copies. None gives none.

    Raises ValueError for pictures with alpha and for masks, which have no meaning here.
    """
    if pictures is None:
        return ()
    if not isinstance(pictures, Tensor):
        if any(mask is not None for _, mask in pictures):
            raise ValueError(
                "class_pictures has masks, which mean nothing here: the whole of each picture is held. Take the masks "
                "off its Concept References"
            )
        return tuple(picture for picture, _ in pictures)
    if split_alpha(pictures, "class_pictures")[1] is not None:
        raise ValueError(
            "class_pictures has 4 channels, the last of them alpha: take it off with Split Image with Alpha"
        )
    with torch.inference_mode(False), torch.no_grad():
        return tuple(to_bchw(pictures.clone(), "class_pictures").cpu())


# Inputs and outputs ------------------------------------------------------------------------------------------------


def model_inputs() -> list[Any]:
    """What is learned on."""
    return [
        io.Model.Input("model", tooltip="SD 1.x, SD 2.x or SDXL. It stays as it is."),
        io.Clip.Input("clip", tooltip="Its CLIP. It stays as it is."),
        io.Vae.Input("vae", tooltip="Its VAE."),
    ]


def training_outputs() -> list[Any]:
    """What a training shows of itself."""
    return [
        io.Image.Output(display_name="losses", tooltip="Loss by step, and its moving mean."),
        io.Image.Output(display_name="previews", tooltip="The subject on the way; the last one is the end."),
        io.String.Output(display_name="report", tooltip="What was trained on what, how far, and which file."),
    ]


def name_input(default: str, place: str) -> Any:
    return io.String.Input(
        "name",
        default=default,
        tooltip=f"Of the file in {place}, without folder and ending. One that is there already is "
        "kept, and a number is added.",
    )


def training_inputs(*, steps: int, lr: float, lr_words: str) -> list[Any]:
    """Inputs of a training; the defaults are a preset's."""
    return [
        io.Int.Input(
            "steps",
            default=steps,
            min=1,
            max=1_000_000,
            tooltip="Updates. With resume on, a finished training goes on when this is raised.",
        ),
        io.Float.Input("lr", default=lr, min=0.0, max=10.0, step=1e-6, round=1e-9, tooltip=lr_words),
        # Not drawn anew for each run: an unbroken and a resumed training have one seed.
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**32 - 1,
            control_after_generate=False,
            tooltip="The same seed and settings give the same concept.",
        ),
        TrainingOptionsIO.Input(
            "options", optional=True, tooltip="Concept Training Options: memory, batch, checkpoints and the like."
        ),
    ]


def checked_token(clip: Any, token: str) -> str:
    """Raises ValueError where `token` is not fit to name a concept, or is a common word of the CLIP."""
    from ...hosts.comfy.learner.text import is_common_word
    from ...protocols.learner import check_token

    word = check_token(token)
    return check_token(word, {word.lower()} if is_common_word(clip, word) else ())


# Training -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """A concept's training as a node asks for it.

    kind: its name in reports and checkpoints. folder: ComfyUI's for the result, "loras" or "embeddings".
    class_images: how many pictures of the class are made. own_class: pictures of it that the
    user gives instead, [3, H, W] in -1..1 each.
    """

    kind: str
    folder: str
    name: str
    token: str
    learned: Learned
    references: tuple[Reference, ...]
    prompts: tuple[str, ...]
    settings: TrainSettings
    options: TrainingOptions
    class_prompt: str = ""
    class_images: int = 0
    own_class: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """state: what was learned, as in its file. previews [N, H, W, 3], plot [1, H, W, 3] in 0..1."""

    state: dict[str, Tensor]
    file: Path
    previews: Tensor
    plot: Tensor
    report: str


def train(model: Any, clip: Any, vae: Any, training: Training, node_id: str | None) -> Trained:
    """Learns the concept and writes its file. MODEL, CLIP and VAE stay as they are.

    An interrupt leaves the checkpoint, and what was learned so far as NAME_interrupted beside the other concepts.

    Raises ValueError and UnsupportedModel for what cannot be trained, RuntimeError for files that cannot be written and
    for a loss that is NaN from the first step on.
    """
    from ...concepts.references import prepare
    from ...hosts.comfy.host import native_size
    from ...hosts.comfy.learner.learner import concept_state, open_learner
    from ...images.plot import loss_plot

    settings, prior = training.settings, training.settings.prior_weight > 0
    size = training.options.size or native_size(model)
    precision = trained_precision(training.options.precision, model.load_device)
    checkpoint = _Checkpoint(training)
    progress = _Progress(training.class_images if prior and not training.own_class else 0, settings.steps, node_id)
    with open_learner(
        model,
        clip,
        vae,
        training.learned,
        precision=precision,
        checkpointing=training.options.gradient_checkpointing,
        batch=settings.batch * (2 if prior else 1),
        size=size,
        seed=settings.seed,
    ) as learner:
        need = learner.need.words()
        say(node_id, need)
        images, masks = zip(*training.references, strict=True)
        references = prepare(learner, images, masks, size)
        of_class = _OfClass(training, learner, size, progress) if prior else None
        facts = _Facts(training, model, learner, size, precision, references, need, of_class)
        try:
            given = of_class.given() if of_class else None
            result = checkpoint.learn(learner, references, given, progress)
        except comfy.model_management.InterruptProcessingException:
            if progress.done:
                _keep_interrupted(training, concept_state(learner), facts.metadata(progress.done))
            raise
        if not result.steps:
            raise RuntimeError(result.stopped)
        state = concept_state(learner)
        previews = progress.pictures(learner, training.prompts[0], references, settings.seed)
    file, written = write(training.folder, training.name, state, facts.metadata(result.steps))
    if result.stopped is None:
        checkpoint.finish()
    report = facts.report(result, progress, [written, *checkpoint.said])
    return Trained(state, file, to_bhwc(previews), loss_plot(result.history(), f"{training.kind}: {file.stem}"), report)


def trained_precision(choice: str, device: torch.device) -> Precision:
    from ...protocols.learner import has_autocast

    if choice != "auto":
        return cast("Precision", choice)  # one of the schema's
    if device.type == "cpu" or not has_autocast(device):
        return "fp32"
    if comfy.model_management.should_use_bf16(device):
        return "bf16"
    return "fp16" if comfy.model_management.should_use_fp16(device) else "fp32"


class _OfClass:
    """The pictures of the class that a training holds to: the user's, or those that are made once and kept."""

    def __init__(self, training: Training, learner: ComfyLearner, size: int, progress: _Progress) -> None:
        self.training, self.learner, self.size, self.progress = training, learner, size, progress
        self.kept: Kept | None = None

    def given(self) -> ClassPictures:
        from ...concepts.class_pictures import ClassPictures

        if self.training.own_class:
            return ClassPictures.of(self.training.own_class, self.size)
        # Of the seed, prompt and model, which a checkpoint knows, there is one such set.
        return ClassPictures([self.training.class_images, 3, self.size, self.size], self._kept)

    def _kept(self) -> list[Tensor]:
        from ...concepts.class_pictures import kept_class_pictures

        training, root = self.training, Path(folder_paths.get_folder_paths(CLASS_FOLDER)[0])
        self.kept = kept_class_pictures(
            self.learner,
            training.class_prompt,
            training.class_images,
            self.size,
            root,
            seed=training.settings.seed,
            on_picture=self.progress.class_picture,
        )
        say(self.progress.node_id, self.words())
        return self.kept.pictures

    @property
    def count(self) -> int:
        return len(self.training.own_class) or self.training.class_images

    def words(self) -> str:
        if self.training.own_class:
            return f"class pictures: the {self.count} that are connected"
        if self.kept is None:
            return "class pictures: none were needed, as no step was left"
        return f"class pictures: {self.kept.words()}"


class _Progress:
    """Progress, loss in words and live previews over class pictures and steps."""

    def __init__(self, class_images: int, steps: int, node_id: str | None) -> None:
        self.class_images, self.node_id = class_images, node_id
        self.bar = comfy.utils.ProgressBar(class_images + steps)
        self.first: int | None = None
        self.done = 0
        self._previews: list[Tensor] = []
        self._mean: float | None = None

    def class_picture(self, made: int) -> None:
        self.bar.update_absolute(made)
        say(self.node_id, f"class picture {made} of {self.class_images}")

    def step(self, report: StepReport) -> None:
        self.first = report.step if self.first is None else self.first
        self.done = report.step
        # One step's loss says more of its noise level than of the training.
        self._mean = report.loss if self._mean is None else 0.95 * self._mean + 0.05 * report.loss
        shown = None
        if report.preview is not None:
            self._previews.append(report.preview.cpu())
            pixels = (to_bhwc(report.preview)[0] * 255).round().to(torch.uint8).numpy()
            shown = ("JPEG", Image.fromarray(pixels), PREVIEW_SIDE)
        say(self.node_id, f"step {report.step} of {report.total}, loss {self._mean:.3g}")
        self.bar.update_absolute(self.class_images + report.step, preview=shown)
        # The bar looks for an interrupt only when it sends something, which is not at every step.
        comfy.model_management.throw_exception_if_processing_interrupted()

    def pictures(self, learner: ComfyLearner, prompt: str, references: PreparedReferences, seed: int) -> Tensor:
        """The previews [N, 3, H, W] in -1..1, the last of the finished concept."""
        from ...concepts.trainer import PREVIEW_CFG, PREVIEW_STEPS

        height, width = references.latents[0].shape[-2:]
        size = (height * learner.downscale, width * learner.downscale)
        last = learner.sample([prompt], size, steps=PREVIEW_STEPS, cfg=PREVIEW_CFG, seed=seed).cpu()
        if self._previews and torch.equal(self._previews[-1], last):
            self._previews.pop()
        return torch.cat([*self._previews, last])


# Files ----------------------------------------------------------------------------------------------------------------


class _Checkpoint:
    """A training's checkpoint in output/concepts: under one name while it runs, under another when it is finished."""

    def __init__(self, training: Training) -> None:
        self.training = training
        root, stem = Path(folder_paths.get_folder_paths(FOLDER)[0]), f"{training.name}_{training.kind.lower()}"
        self.running = root / f"{stem.replace(' ', '_')}.safetensors"
        self.finished = self.running.with_name(f"{self.running.stem}_finished.safetensors")
        self.said: list[str] = []

    def learn(
        self,
        learner: ComfyLearner,
        references: PreparedReferences,
        class_pictures: ClassPictures | None,
        progress: _Progress,
    ) -> LearnResult:
        """Trains, from the checkpoint where one is to be resumed; those that are there stay until a new one is."""
        from ...concepts.checkpoint import UnusableCheckpoint
        from ...concepts.trainer import learn

        def run(source: Path | None) -> LearnResult:
            return learn(
                learner,
                references,
                self.training.prompts,
                self.training.settings,
                class_pictures=class_pictures,
                class_prompt=self.training.class_prompt or None,
                checkpoint=self.running,
                resume=source or False,
                on_step=progress.step,
            )

        found = (
            [path for path in (self.running, self.finished) if path.exists()] if self.training.options.resume else []
        )
        if not found:
            return run(None)
        try:
            return run(found[0])
        except UnusableCheckpoint as error:
            if found[0] == self.running:
                raise ValueError(f"{error} Or switch resume off, which begins anew.") from error
        self.said.append("begun anew: the finished training of this name had other settings, references or base model")
        return run(None)

    def finish(self) -> None:
        place = self.finished
        try:
            if self.running.exists():  # else the finished one had all the steps
                os.replace(self.running, self.finished)
        except OSError as error:  # what was learned is there all the same
            logger.warning("The checkpoint keeps its name: %s", error)
            place = self.running
        self.said.append(f"checkpoint, to go on from with more steps: {place}")


def write(folder: str, name: str, state: dict[str, Tensor], metadata: dict[str, str]) -> tuple[Path, str]:
    """Writes a concept into ComfyUI's folder, with a number where the name is taken; the path, and a line about it.

    A file that holds these very values is not written again.
    """
    from ...concepts.files import write_concept

    root = Path(folder_paths.get_folder_paths(folder)[0])
    path, last, number = root / f"{name}.safetensors", None, 1
    while path.exists():
        last, number = path, number + 1
        path = root / f"{name}_{number:05}.safetensors"
    if last is not None and _holds(last, state):
        return last, f"file: {last} (there already, with these very values)"
    write_concept(path, state, metadata)
    why = f" ({name} was there already, and is kept)" if last is not None else ""
    return path, f"file: {path}{why}"


def _holds(path: Path, state: dict[str, Tensor]) -> bool:
    from safetensors import SafetensorError

    from ...weights.files import read_safetensors

    try:
        found = read_safetensors(path)[0]
    except (SafetensorError, OSError):
        return False
    return found.keys() == state.keys() and all(torch.equal(found[name], tensor) for name, tensor in state.items())


def _keep_interrupted(training: Training, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from ...concepts.files import write_concept

    name = f"{training.name}{INTERRUPTED}"
    path = Path(folder_paths.get_folder_paths(training.folder)[0]) / f"{name}.safetensors"
    try:
        try:
            write_concept(path, state, metadata)
        except RuntimeError as error:
            if not (path.exists() and isinstance(error.__cause__, PermissionError)):
                raise
            path, _ = write(training.folder, name, state, metadata)  # Windows: Load LoRA has the older one open
    except RuntimeError as error:  # the interrupt is on its way to the user
        logger.error("%s", error)
    else:
        logger.warning("Interrupted. What was learned so far: %s. Queue again, with resume on, to go on.", path)


# What is said of a training -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Facts:
    training: Training
    model: Any
    learner: ComfyLearner
    size: int
    precision: str
    references: PreparedReferences
    need: str
    of_class: _OfClass | None

    def metadata(self, steps: int) -> dict[str, str]:
        """Of the file: this pack's own entry whole, and what other programs look for."""
        from ...protocols.learner import LowRank

        training, settings = self.training, self.training.settings
        own = {
            "kind": training.kind,
            "token": training.token,
            "prompts": list(training.prompts),
            "class_prompt": training.class_prompt,
            "class_images": self.of_class.count if self.of_class else 0,
            "learned": {"kind": type(training.learned).__name__, **dataclasses.asdict(training.learned)},
            "settings": dataclasses.asdict(settings),
            "steps": steps,
            "size": self.size,
            "precision": self.precision,
            "references": len(self.references),
            "references_digest": self.references.digest,
            "base": base_family(self.model),
            "prediction": self.learner.prediction,
        }
        found = {
            "blendswap_concept": json.dumps(own),
            "modelspec.title": training.name,
            "modelspec.trigger_phrase": training.prompts[0],
            "modelspec.prediction_type": self.learner.prediction.removesuffix("_prediction"),
            "ss_output_name": training.name,
            "ss_base_model_version": base_family(self.model),
            "ss_learning_rate": str(settings.lr),
            "ss_steps": str(steps),
            "ss_seed": str(settings.seed),
            "ss_resolution": f"({self.size}, {self.size})",
            "ss_num_train_images": str(len(self.references)),
        }
        learned = training.learned
        if isinstance(learned, LowRank):
            found |= {
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(learned.rank),
                "ss_network_alpha": str(learned.alpha or learned.rank),
            }
        return found

    def report(self, result: LearnResult, progress: _Progress, files: list[str]) -> str:
        training, settings = self.training, self.training.settings
        masks, more = sum(mask is not None for mask in self.references.masks), len(training.prompts) - 1
        lines = [
            f"{training.kind} of {_what(training.learned)} on {base_family(self.model)} ({self.learner.prediction}), "
            f"{self.precision}",
            self.need,
            f"{len(self.references)} references, {masks} with a mask, at {self.size} pixels",
            f"prompt: {training.prompts[0]}" + (f" (and {more} more)" if more else ""),
        ]
        if self.of_class is not None:
            pictures = f"{self.of_class.count} pictures of '{training.class_prompt}'"
            lines += [f"prior: {pictures}, weight {settings.prior_weight:g}", self.of_class.words()]
        elif training.own_class:
            lines.append("class_pictures are not used: prior_weight is 0")
        lines += [
            f"{result.steps} steps{_since(progress)}, lr {settings.lr:g}, batch {settings.rows}, seed {settings.seed}",
            _losses(result),
            *files,
            *(f"note: {note}" for note in self.references.notes),
        ]
        if result.stopped is not None:
            lines.append(f"STOPPED: {result.stopped}")
        return "\n".join(lines)


def base_family(model: Any) -> str:
    """The base model as other programs' LoRA files call it, or ComfyUI's name of its class."""
    import comfy.supported_models as supported

    config = model.model.model_config
    for kind, name in ((supported.SDXL, "sdxl_base_v1-0"), (supported.SD20, "sd_v2"), (supported.SD15, "sd_v1")):
        if isinstance(config, kind):
            return name
    return type(config).__name__


def _what(learned: Learned) -> str:
    from ...protocols.learner import LowRank, TokenVectors

    if isinstance(learned, TokenVectors):
        plural = "s" if learned.count > 1 else ""
        return f"{learned.count} vector{plural} for '{learned.token}', begun as '{learned.initial_word}'"
    both = "UNet and text encoder" if learned.text_encoder else "UNet"
    if isinstance(learned, LowRank):
        where = "all layers" if learned.convolutions else "attention"
        return f"a LoRA of rank {learned.rank}, alpha {learned.alpha or learned.rank:g}, {where} of {both}"
    return f"every weight of {both}"


def _since(progress: _Progress) -> str:
    if progress.first is None:
        return " (all of them done before)"
    return f" (went on after step {progress.first - 1})" if progress.first > 1 else ""


def _losses(result: LearnResult) -> str:
    tenth = max(1, result.steps // 10)
    first, last = result.losses[:tenth, 1].mean(), result.losses[-tenth:, 1].mean()
    words = f"loss of the references: {first:.3g} over the first {tenth} steps, {last:.3g} over the last"
    if result.losses[:, 2].any():
        first, last = result.losses[:tenth, 2].mean(), result.losses[-tenth:, 2].mean()
        words += f"; of the class pictures {first:.3g} and {last:.3g}"
    return words
