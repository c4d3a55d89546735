"""The paper's comparison of latent spaces, on images that are at hand: see `examples/study_latents.py`."""
