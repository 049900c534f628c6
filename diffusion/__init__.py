"""Mathematics of diffusion: noise schedules, DDIM, levels of noise. Needs torch alone."""
