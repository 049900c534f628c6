"""For developers: a ComfyUI server, the showcase, the self-test, training. Not in the registry's archive."""
