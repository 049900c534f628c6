"""The demo's edits, swaps and learned concept, run in a ComfyUI and judged."""
