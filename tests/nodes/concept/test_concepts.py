"""Learning nodes on the demo model: files that stock nodes take, trainings that go on, errors that help."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from blendswap import run
from blendswap.tools.server import start_server

from ..conftest import SOURCE, checksum

pytestmark = pytest.mark.needs_comfy

OPTIONS = dict(
    batch=1,
    accumulation=1,
    min_snr=0.0,
    flip=False,
    checkpoint_every=1,
    preview_every=0,
    size=0,
    precision="fp32",
    gradient_checkpointing=False,
    resume=True,
)
FEW = dict(OPTIONS, steps=3, lr=1e-3, seed=0)
DREAMBOOTH = dict(
    FEW,
    instance_prompt="a sks star",
    token="sks",
    class_prompt="a star",
    what="lora",
    rank=2,
    text_encoder=True,
    prior_weight=0.0,
    class_images=2,
)
INVERSION = dict(FEW, token="sks", initial_word="star", vectors=2, templates="a {}\na {} on a sky background", batch=2)


def with_options(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a learning node: those of Concept Training Options go through such a node."""
    from blendswap.nodes.concept.options import ConceptTrainingOptions

    names = {each.id for each in ConceptTrainingOptions.define_schema().inputs}
    options = {name: value for name, value in inputs.items() if name in names}
    rest = {name: value for name, value in inputs.items() if name not in names}
    return {**rest, "options": ConceptTrainingOptions.execute(**options).args[0]}


@pytest.fixture(scope="module")
def pictures(comfy) -> torch.Tensor:
    from blendswap.nodes.demo import DemoSubject

    return DemoSubject.execute("flower", 3).args[0]


@pytest.fixture
def dreambooth(kit, pictures):
    """Runs the node: MODEL, CLIP, lora_name, losses, previews, report."""
    from blendswap.nodes.concept.dreambooth import LearnConceptDreamBooth

    def run(name: str, **changes: Any) -> tuple:
        inputs = dict(DREAMBOOTH, model=kit.model, clip=kit.clip, vae=kit.vae, images=pictures, name=name)
        return kit.run(LearnConceptDreamBooth, **with_options({**inputs, **changes}))

    return run


@pytest.fixture
def inversion(kit, pictures):
    """Runs the node: CLIP, embedding, losses, previews, report."""
    from blendswap.nodes.concept.inversion import LearnConceptTextualInversion

    def run(name: str, **changes: Any) -> tuple:
        inputs = dict(INVERSION, model=kit.model, clip=kit.clip, vae=kit.vae, images=pictures, name=name)
        return kit.run(LearnConceptTextualInversion, **with_options({**inputs, **changes}))

    return run


def folder(kind: str) -> Path:
    import folder_paths

    return Path(folder_paths.get_folder_paths(kind)[0])


def sample(kit, model: Any, clip: Any, prompt: str = "a sks star") -> torch.Tensor:
    """A picture by ComfyUI's own nodes."""
    from nodes import CLIPTextEncode, KSampler

    with torch.inference_mode():
        positive, negative = (CLIPTextEncode().encode(clip, text)[0] for text in (prompt, ""))
        made = KSampler().sample(model, 1, 3, 4.0, "ddim", "ddim_uniform", positive, negative, kit.empty())[0]
        return kit.vae.decode(made["samples"])


# What comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["lora", "full"])
def test_the_file_through_the_stock_loader_gives_the_pictures_of_the_outputs(kit, dreambooth, what):
    from nodes import LoraLoader

    before = checksum(kit.model), kit.snapshot(kit.model), text_checksum(kit.clip)
    model, clip, lora_name, losses, previews, report = dreambooth(f"stock_{what}", what=what, preview_every=1)
    assert lora_name == f"stock_{what}.safetensors"
    with torch.inference_mode():
        loaded = LoraLoader().load_lora(kit.model, kit.clip, lora_name, 1.0, 1.0)
    own, stock, plain = sample(kit, model, clip), sample(kit, *loaded), sample(kit, kit.model, kit.clip)
    torch.testing.assert_close(own, stock, rtol=0, atol=1e-5)
    assert (own - plain).abs().max() > 1e-3
    assert losses.ndim == 4 and losses.shape[-1] == 3
    assert previews.shape == (3, 64, 64, 3)
    assert "3 steps" in report and str(folder("loras") / lora_name) in report
    assert (checksum(kit.model), kit.snapshot(kit.model), text_checksum(kit.clip)) == before


def text_checksum(clip: Any) -> float:
    return sum(float(weight.detach().double().abs().sum()) for weight in clip.cond_stage_model.parameters())


def test_the_embedding_in_a_stock_prompt_gives_the_pictures_of_the_output(kit, inversion):
    clip, embedding, _, previews, report = inversion("stock_word")
    assert embedding == "embedding:stock_word" and previews.shape == (1, 64, 64, 3)
    by_file = sample(kit, kit.model, kit.clip, "a embedding:stock_word on a sky background")
    own = sample(kit, kit.model, clip, "a sks on a sky background")
    torch.testing.assert_close(own, by_file, rtol=0, atol=1e-5)
    assert (own - sample(kit, kit.model, kit.clip, "a star on a sky background")).abs().max() > 1e-3
    assert "2 vectors for 'sks', begun as 'star'" in report


def test_metadata_says_what_was_learned_from_what(dreambooth):
    name = dreambooth("told", alpha=4.0)[2]
    with safe_open(str(folder("loras") / name), "pt") as file:
        metadata = file.metadata()
    own = json.loads(metadata["blendswap_concept"])
    assert (own["token"], own["prompts"], own["class_prompt"], own["steps"]) == ("sks", ["a sks star"], "a star", 3)
    assert own["learned"] == {"kind": "LowRank", "rank": 2, "alpha": 4.0, "text_encoder": True, "convolutions": False}
    assert metadata["ss_network_dim"] == "2" and metadata["ss_network_alpha"] == "4.0"


def test_a_file_that_is_there_is_kept_and_the_next_one_gets_a_number(dreambooth):
    first = dreambooth("twice", seed=1)
    kept = load_file(folder("loras") / first[2])
    second = dreambooth("twice", seed=2)
    assert (first[2], second[2]) == ("twice.safetensors", "twice_00002.safetensors")
    assert "twice was there already, and is kept" in second[5]
    assert all(torch.equal(tensor, kept[name]) for name, tensor in load_file(folder("loras") / first[2]).items())


def test_the_same_seed_gives_the_same_file_which_is_not_written_twice(dreambooth):
    first, second = dreambooth("same", resume=False), dreambooth("same", resume=False)
    assert first[2] == second[2] and "there already, with these very values" in second[5]


def test_the_prior_is_held_by_pictures_of_the_class(dreambooth):
    report = dreambooth("prior", prior_weight=0.5)[5]
    assert "prior: 2 pictures of 'a star', weight 0.5" in report and "of the class pictures" in report


def class_files() -> set[Path]:
    return {path for path in folder("class_pictures").rglob("*.png")}


def test_class_pictures_are_made_once_kept_and_added_to(dreambooth):
    prior = dict(prior_weight=1.0, class_prompt="a kept star", seed=11)
    before = class_files()
    reports = [
        dreambooth(f"kept_{count}_{what}", class_images=count, what=what, **prior)[5]
        for count, what in ((2, "lora"), (2, "full"), (3, "lora"))
    ]
    made = class_files() - before
    assert len(made) == 3 and len({path.parent for path in made}) == 1
    place = next(iter(made)).parent
    assert f"class pictures: 2 made, in {place}" in reports[0]
    assert f"class pictures: 2 kept from before, in {place}" in reports[1]
    assert f"class pictures: 2 kept from before, 1 made, in {place}" in reports[2]


def test_no_class_picture_is_made_where_no_step_is_left_or_no_prior_is_held(dreambooth, monkeypatch):
    from blendswap.concepts import class_pictures

    dreambooth("enough", prior_weight=1.0, seed=12)
    for path in class_files():
        path.unlink()
    monkeypatch.setattr(class_pictures, "kept_class_pictures", None)  # not to be called
    assert "none were needed, as no step was left" in dreambooth("enough", prior_weight=1.0, seed=12)[5]
    assert "class pictures" not in dreambooth("no_prior", prior_weight=0.0, seed=12)[5]


def test_own_class_pictures_are_taken_and_none_are_made(kit, dreambooth, pictures):
    from blendswap.nodes.concept.training import ConceptReferences

    before, own = class_files(), pictures.flip(1)
    prior = dict(prior_weight=1.0, class_images=9, seed=13)
    by_batch = dreambooth("own_batch", class_pictures=own, **prior)
    several = kit.run(ConceptReferences, images=own[:1, :, :32])[0]
    by_references = dreambooth("own_references", class_pictures=several, **prior)[5]
    assert "prior: 3 pictures of 'a star'" in by_batch[5]
    assert "class pictures: the 3 that are connected" in by_batch[5] and "the 1 that are connected" in by_references
    assert class_files() == before
    with safe_open(str(folder("loras") / by_batch[2]), "pt") as file:
        assert json.loads(file.metadata()["blendswap_concept"])["class_images"] == 3
    # What they are is part of the training.
    assert "begun anew" in dreambooth("own_batch", class_pictures=own.roll(1, 0), **prior)[5]
    assert "begun anew" in dreambooth("own_batch", class_pictures=pictures, **prior)[5]
    assert "all of them done before" in dreambooth("own_batch", class_pictures=pictures, **prior)[5]
    unused = dreambooth("own_unused", class_pictures=own, prior_weight=0.0)[5]
    assert "class_pictures are not used: prior_weight is 0" in unused


def test_references_of_several_sizes_and_masks_are_taken_together(kit, dreambooth, pictures):
    from blendswap.nodes.concept.training import ConceptReferences

    wide = kit.run(ConceptReferences, images=pictures[:1, 16:48])[0]
    mask = torch.zeros(64, 64)
    mask[16:48, 16:48] = 1
    both = kit.run(ConceptReferences, images=pictures[:2], masks=mask, references=wide)[0]
    report = dreambooth("sizes", images=pictures[2:], references=both)[5]
    assert "4 references, 2 with a mask" in report


# Trainings that go on -----------------------------------------------------------------------------------------------


def interrupting(monkeypatch, at: int) -> None:
    """The user presses interrupt while step `at` is made."""
    import comfy.model_management
    import comfy.utils

    real = comfy.utils.ProgressBar.update_absolute

    def update(self, value, *arguments, **named):
        if value == at:
            comfy.model_management.interrupt_current_processing(True)
        real(self, value, *arguments, **named)

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", update)


@pytest.mark.parametrize("node", ["dreambooth", "inversion"])
def test_an_interrupt_keeps_what_was_learned_and_the_next_run_goes_on(request, monkeypatch, node):
    import comfy.model_management

    learn, kind = request.getfixturevalue(node), "loras" if node == "dreambooth" else "embeddings"
    whole = learn(f"whole_{node}")
    with monkeypatch.context() as patched:
        interrupting(patched, 2)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            learn(f"broken_{node}")
    assert (folder(kind) / f"broken_{node}_interrupted.safetensors").is_file()
    assert not (folder(kind) / f"broken_{node}.safetensors").exists()
    again = learn(f"broken_{node}")
    assert "(went on after step 2)" in again[-1] and "3 steps" in whole[-1]
    one, two = (load_file(folder(kind) / f"{which}_{node}.safetensors") for which in ("whole", "broken"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupt_keeps_what_was_learned_beside_a_file_that_a_loader_has_open(dreambooth, monkeypatch):
    import comfy.model_management

    plain, held = os.replace, folder("loras") / "held_interrupted.safetensors"

    def replace(source, target):
        if Path(target) == held and held.exists():
            raise PermissionError(errno.EACCES, "Access is denied")  # as Windows does
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for step in (1, 2):
        with monkeypatch.context() as patched:
            interrupting(patched, step)
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                dreambooth("held")
    assert sorted(path.name for path in folder("loras").glob("held*")) == [
        "held_interrupted.safetensors",
        "held_interrupted_00002.safetensors",
    ]


def test_a_finished_training_goes_on_when_asked_for_more_steps_and_begins_anew_with_other_settings(dreambooth):
    dreambooth("longer", steps=2)
    assert "(went on after step 2)" in dreambooth("longer", steps=3)[5]
    assert "(all of them done before)" in dreambooth("longer", steps=3)[5]
    anew = dreambooth("longer", steps=2, lr=1e-2)[5]
    assert "begun anew" in anew and "went on" not in anew


def test_an_unfinished_training_with_other_settings_says_which_and_how_to_begin_anew(dreambooth, monkeypatch):
    import comfy.model_management

    with monkeypatch.context() as patched:
        interrupting(patched, 1)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            dreambooth("unfinished")
    with pytest.raises(ValueError, match=r"lr was 0.001, now 0.01.*switch resume off"):
        dreambooth("unfinished", lr=1e-2)
    assert "went on" not in dreambooth("unfinished", lr=1e-2, resume=False)[5]


@pytest.mark.parametrize("state", ["running", "finished"])
def test_resume_off_loses_nothing_where_the_new_training_ends_at_once(dreambooth, monkeypatch, state):
    import comfy.model_management

    from blendswap.concepts import trainer

    name = f"anew_{state}"
    if state == "finished":
        dreambooth(name, steps=2)
    else:
        with monkeypatch.context() as patched:
            interrupting(patched, 2)
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                dreambooth(name)
    before = {path.name: path.read_bytes() for path in folder("concepts").glob(f"{name}_*")}

    def stopped(*_):
        raise comfy.model_management.InterruptProcessingException

    for changes in ({"resume": False}, *([{"lr": 1e-2}] if state == "finished" else [])):
        with monkeypatch.context() as patched:
            patched.setattr(trainer, "masked_error", stopped)
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                dreambooth(name, **changes)
        assert {path.name: path.read_bytes() for path in folder("concepts").glob(f"{name}_*")} == before
    assert "(went on after step 2)" in dreambooth(name)[5]
    assert "went on" not in dreambooth(name, resume=False)[5]
    assert [path.name for path in folder("concepts").glob(f"{name}_*")] == [f"{name}_dreambooth_finished.safetensors"]


def test_a_loss_that_is_nan_stops_the_training_and_keeps_the_steps_before(dreambooth, monkeypatch):
    from blendswap.concepts import trainer

    calls, plain = [], trainer.masked_error

    def failing(*args):
        calls.append(None)
        return plain(*args) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(trainer, "masked_error", failing)
    *_, name, _losses, _, report = dreambooth("nan")
    assert "STOPPED: The loss or its gradient became NaN or infinite at step 3" in report
    assert all(torch.isfinite(tensor).all() for tensor in load_file(folder("loras") / name).values())
    monkeypatch.setattr(trainer, "masked_error", lambda *args: plain(*args) * math.nan)
    with pytest.raises(RuntimeError, match="NaN or infinite at step 1"):
        dreambooth("nan_from_the_start")


@pytest.mark.parametrize(("where", "message"), [("concepts", "disk is full"), ("loras", "No space left on device")])
def test_a_full_disk_is_said_no_half_file_is_left_and_the_next_run_goes_on(dreambooth, monkeypatch, where, message):
    plain = os.replace

    def full(source, target):
        if Path(target).parent == folder(where):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(RuntimeError, match=message):
            dreambooth(f"full_{where}")
    assert not list(folder(where).glob(f"*full_{where}*"))
    again = dreambooth(f"full_{where}")[5]
    assert ("all of them done before" in again) == (where == "loras")


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda _: {"images": None}, "no reference picture: connect 3 to 20"),
        (
            lambda pictures: {"images": torch.cat([pictures, torch.zeros_like(pictures[..., :1])], -1)},
            "mask of reference 1 is empty",
        ),
        (lambda pictures: {"masks": torch.ones(2, 64, 64)}, r"masks is \[2, 64, 64\]: give one for all of the 3"),
        (lambda pictures: {"masks": torch.zeros(1, 64, 64)}, "mask of reference 1 is empty"),
        (
            lambda pictures: {"class_pictures": torch.cat([pictures, pictures[..., :1]], -1)},
            "class_pictures has 4 channels.*Split Image",
        ),
        (
            lambda pictures: {"class_pictures": ((pictures[0].movedim(-1, 0), torch.ones(64, 64)),)},
            "class_pictures has masks, which mean nothing here",
        ),
        (lambda _: {"token": "star", "instance_prompt": "a star"}, "token 'star' is a common word"),
        (lambda _: {"token": "two words"}, "more than one word"),
        (lambda _: {"instance_prompt": "a star"}, "without the token 'sks'"),
        (lambda _: {"prior_weight": 1.0, "class_prompt": " "}, "class_prompt is empty, but prior_weight is above 0"),
        (lambda _: {"name": "../evil"}, "which is a path"),
        (lambda _: {"name": ""}, "name is empty"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_the_cure(dreambooth, pictures, changes, message):
    given = {"name": "refused", **changes(pictures)}
    with pytest.raises(ValueError, match=message):
        dreambooth(given.pop("name"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token": "star"}, "common word"),
        ({"initial_word": ""}, "initial_word is empty"),
        ({"templates": "a star"}, "must have {} once"),
        ({"images": None}, "no reference picture"),
        ({"name": "a/b"}, "which is a path"),
    ],
)
def test_so_it_is_for_a_word(inversion, changes, message):
    given = {"name": "refused", **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        inversion(given.pop("name"), **given)


def test_one_picture_is_enough_but_warned_of(dreambooth, pictures):
    assert "note: One reference alone" in dreambooth("one", images=pictures[:1])[5]


def test_models_of_another_family_are_refused_by_name(kit, dreambooth, pixel_model):
    from blendswap.hosts.comfy.host import UnsupportedModel

    with pytest.raises(UnsupportedModel, match="pixel-space prior without text"):
        dreambooth("pixel", model=pixel_model)


@pytest.fixture
def pixel_model(comfy):
    from blendswap.demo import files
    from blendswap.hosts.comfy.adm import load_native_model

    return load_native_model(files.PRIOR)


# Scoring ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def score(kit, pictures):
    """Runs ConceptScore: score, report, sheet."""
    from blendswap.nodes.blend.clip_guide import CLIPGuideLoader
    from blendswap.nodes.concept.score import ConceptScore

    scorer = kit.run(CLIPGuideLoader, clip_name="demo")[0]

    def run(**changes: Any) -> tuple:
        inputs = dict(
            model=kit.model,
            clip=kit.clip,
            vae=kit.vae,
            base_model=kit.model,
            base_clip=kit.clip,
            scorer=scorer,
            prompt="a sks star",
            class_prompt="a star",
            samples=4,
            steps=3,
            cfg=4.0,
            images=pictures,
        )
        return kit.run(ConceptScore, **{**inputs, **changes})

    return run


def test_a_model_that_learned_nothing_is_called_weak_and_has_not_drifted(score):
    value, report, sheet = score()
    assert report.startswith(("weak", "unclear"))
    assert "class: gone 0% of the way to the subject, differs 100% as much" in report
    assert "scorer: " in report and "must not have guided" in report
    assert value < 0.5 or math.isnan(value)
    assert sheet.shape == (1, 4 * 68, 4 * 68, 3)


def test_pictures_of_the_subject_itself_score_high(kit, score, monkeypatch):
    """What a perfect model would sample is drawn."""
    from blendswap.nodes.concept import score as concept_score
    from blendswap.nodes.demo import DemoSubject

    drawn = DemoSubject.execute("flower", 4, seed=77).args[0]
    plain = concept_score.sampled_pictures

    def pictures(model, clip, vae, words, *rest):
        return iter([drawn]) if words == "a sks star" else plain(model, clip, vae, words, *rest)

    monkeypatch.setattr(concept_score, "sampled_pictures", pictures)
    value, report, _ = score()
    assert value > 0.5 and report.startswith("known")


# A weak concept in a swap -------------------------------------------------------------------------------------------


def test_a_swap_that_gives_the_source_back_says_that_the_concept_may_not_be_known(kit):
    attention = kit.capture(settings=kit.settings("custom", self_map=50, cross_map=50, self_output=50))[0]
    unknown = SOURCE.replace("a red", "a sks red")
    *_, report, told = kit.swap(attention, unknown)
    assert "note: the picture hardly changed, although the prompts differ" in report and "ConceptScore" in report
    assert any("hardly changed" in note for note in json.loads(told)["notes"])
    loose = kit.capture(settings=kit.settings("custom", self_map=15, cross_map=15, self_output=0))[0]
    assert "hardly changed" not in kit.swap(loose)[2]
    assert "hardly changed" not in kit.swap(attention, SOURCE)[2]  # nothing was asked for


# A server that is killed ----------------------------------------------------------------------------------------------


def test_a_training_whose_server_was_killed_goes_on_to_the_same_weights(comfy_path, tmp_path):
    """On one machine and version the weights are equal bit for bit; 1e-6 allows for another way of adding up."""
    steps = 30  # enough that the kill comes before the end, also where this process waits for its turn
    pages = run.pages_environment(Path(sys.executable), comfy_path)

    def serve():
        return start_server(comfy_path, base, sys.executable, env=pages)

    def prompt(name: str) -> dict:
        inputs = dict(
            {name: value for name, value in DREAMBOOTH.items() if name not in OPTIONS},
            steps=steps,
            prior_weight=1.0,
            name=name,
            model=["1", 0],
            clip=["1", 1],
            vae=["1", 2],
            images=["2", 0],
            options=["4", 0],
        )
        return {
            "1": {"class_type": "DemoModelLoader", "inputs": {}},
            "2": {"class_type": "DemoSubject", "inputs": {"subject": "flower", "count": 3, "seed": 0}},
            "3": {"class_type": "LearnConceptDreamBooth", "inputs": inputs},
            "4": {"class_type": "ConceptTrainingOptions", "inputs": dict(OPTIONS, alpha=0.0, all_layers=False)},
        }

    base = tmp_path / "base"
    checkpoint = base / "output" / "concepts" / "killed_dreambooth.safetensors"
    with serve() as server:
        server.queue(prompt("killed"))
        deadline = time.monotonic() + 400
        while not checkpoint.exists():
            assert time.monotonic() < deadline, server.log()[-3000:]
            server.check_alive()
            time.sleep(0.02)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with serve() as server:
        again = server.run(prompt("killed"), timeout=500)
        server.run(prompt("unbroken"), timeout=500)
    step = int(re.search(r"went on after step (\d+)", "".join(again["3"]["text"]))[1])
    assert 1 <= step < steps
    one, two = (load_file(base / "models" / "loras" / f"{name}.safetensors") for name in ("killed", "unbroken"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{"alpha": 2.0}, {"all_layers": True}])
def test_an_option_of_a_lora_is_refused_where_none_is_trained(dreambooth, inversion, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} of the options.*only a LoRA has"):
        dreambooth("no_lora", what="full", **changes)
    with pytest.raises(ValueError, match=f"{name} of the options.*only a LoRA has"):
        inversion("no_lora", **changes)


def test_without_options_a_training_has_the_defaults_of_the_node(kit, pictures):
    from blendswap.nodes.concept.options import DEFAULTS, ConceptTrainingOptions

    schema = {each.id: each.default for each in ConceptTrainingOptions.define_schema().inputs}
    assert ConceptTrainingOptions.execute(**schema).args[0] == DEFAULTS
    assert DEFAULTS.settings(steps=1, lr=1.0, seed=0, batch=4).batch == 4
