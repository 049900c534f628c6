"""From a picture to the noise that it came from: DDIM, null-text, proximal guidance."""
