"""Where the models that come with the pack lie."""

from __future__ import annotations

from pathlib import Path

MODELS = Path(__file__).parent / "models"
CLIP = MODELS / "clip" / "model.safetensors"
READER = MODELS / "reader" / "model.safetensors"
LPIPS = MODELS / "lpips" / "model.safetensors"
PRIOR = MODELS / "prior"
TEXT = MODELS / "text"
JUDGE = MODELS / "judge" / "model.safetensors"
SUBJECT_JUDGE = MODELS / "subjects" / "model.safetensors"
