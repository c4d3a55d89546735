"""Training objectives and what training scripts share, by module; importing the package alone imports nothing.

- `masking`, `draws`: which patches are masked, and random numbers that depend on an image's index only.
- `targets`, `auxiliary`, `tokenizer_objective`: the tokenizer's loss.
- `flow_matching`: the generators' loss.
- `optim`: weight-decay groups, learning-rate schedules, moving average.
- `recipes`, `checkpointing` and their neighbours: what a run is made of and how it stops and continues.
"""
