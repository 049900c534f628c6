"""OpenAI's guided diffusion U-Net (Dhariwal and Nichol 2021), by its published checkpoints."""
