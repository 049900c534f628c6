"""Words and tokens of two prompts, and which belongs to which."""
