"""Score generated images: FID, sFID, Inception Score, KID, precision and recall, and FD on DINOv2's features.

A set that `examples/generate.py` has made, by the protocol of ADM's suite (its reference file holds statistics of the
training set, for FID and sFID, and 10 000 images, for precision and recall), by 8 processes:

    accelerate launch --num_processes 8 --mixed_precision no examples/evaluate_generation.py \
        --samples outputs/sit-xl-50k --reference VIRTUAL_imagenet256_labeled.npz --output_dir outputs/sit-xl-scores

Straight from a pipeline, whose images are scored as they are sampled and kept nowhere:

    accelerate launch --num_processes 8 --mixed_precision no examples/evaluate_generation.py \
        --pretrained_model_name_or_path outputs/sit-xl --num_inference_steps 250 --guidance_scale 1.9 \
        --guidance_interval 0 0.75 --dtype bfloat16 --reference VIRTUAL_imagenet256_labeled.npz \
        --output_dir outputs/sit-xl-scores

FD-DINOv2 and KID of a folder of images against a data set, cropped as ADM does:

    python examples/evaluate_generation.py --samples path/to/samples --reference path/to/data \
        --reference_resolution 256 --metrics fid kid --extractor dinov2 --output_dir outputs/scores

Prints a table and its protocol, and writes both to `generation.json`; `statistics.npz` and `features/features.npz` in
`output_dir` may be the `--reference` of others. Each image counts once on any number of processes. The same command
continues a run that was stopped or killed, and one with other `--metrics` uses the features that are there. Needs
`pip install '.[evaluation]'`. It is the same as the command `maetok-eval generation`.
"""

from maetok_hf.commands.evaluate_generation import main


if __name__ == "__main__":
    main()
