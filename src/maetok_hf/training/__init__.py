"""Training objectives and what training scripts share, by module; importing the package alone imports nothing.

- `masking`, `draws`: which patches are masked, and random numbers that depend on an image's index only.
- `targets`, `auxiliary`, `tokenizer_objective`: the tokenizer's loss.
- `flow_matching`, `guidance_free`, `alignment`: the generators' loss.
- `tokenizer_parts`, `generator_parts`, `lora`: from a recipe to the modules of a run.
- `latent_encoding`, `latent_statistics`: latents of whole data sets.
- `optim`: weight-decay groups, learning-rate schedules, moving average.
- `gradient_checkpointing`: which blocks are recomputed in the backward pass.
- `recipes`, `checkpointing` and their neighbours: what a run is made of and how it stops and continues.
"""
