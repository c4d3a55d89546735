"""Score a pipeline over scales and intervals of guidance, on 5 to 10 thousand images each.

The sweep behind a choice of guidance for ImageNet at 256 pixels, by 8 processes:

    accelerate launch --num_processes 8 --mixed_precision no examples/sweep_guidance.py \
        --pretrained_model_name_or_path outputs/sit-xl --reference VIRTUAL_imagenet256_labeled.npz \
        --guidance_scales 1 1.3 1.6 1.9 2.2 --guidance_intervals 0,1 0,0.75 0,0.5 --num_images 10000 \
        --num_inference_steps 250 --dtype bfloat16 --output_dir outputs/sit-xl-guidance

Classifier-free guidance against autoguidance by an early checkpoint:

    python examples/sweep_guidance.py --pretrained_model_name_or_path outputs/sit-xl \
        --guidance_methods cfg autoguidance \
        --guidance_transformer_name_or_path outputs/sit-xl/checkpoint-1000000/transformer_ema \
        --reference VIRTUAL_imagenet256_labeled.npz --num_images 5000 --output_dir outputs/sit-xl-guidance

All cells have the same noises and classes. Prints a table and its protocol, and writes `guidance.md`, `guidance.json`
and the picture `guidance.png`. FIDs of 10 000 images are 2.5 to 3 higher than those of 50 000: compare them with each
other only. A cell that is measured is kept, so the same command continues what was stopped, and one with more scales
adds these. Needs `pip install '.[evaluation]'`. It is the same as the command `maetok-eval guidance`.
"""

from maetok_hf.commands.sweep_guidance import main


if __name__ == "__main__":
    main()
