"""Networks with their published weights: CLIP, LPIPS and the ADM, each read by code of its own."""
