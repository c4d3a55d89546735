"""Compare the latents of any autoencoders of diffusers: linear probe, Gaussian mixtures, UMAP, channels, ranks.

Two tokenizers on ImageNet, the probe scored on its validation split (log in first: the data set is gated):

    python examples/analyze_latents.py --tokenizer outputs/maetok-b-128 stabilityai/sd-vae-ft-ema \
        --dataset ILSVRC/imagenet-1k --held_out_split validation --dataloader_num_workers 8 \
        --output_dir outputs/analysis

A folder of images with one sub-folder per class, of which a tenth is held out, on a CPU in minutes:

    python examples/analyze_latents.py --tokenizer runs/autoencoder runs/maetok --names AE MAETok \
        --dataset path/to/folder --resolution 64 --mixture_sizes 10 20 50 --output_dir outputs/analysis

Latents that `examples/cache_latents.py` has stored, without encoding anything:

    python examples/analyze_latents.py --tokenizer outputs/latents outputs/latents-vae --output_dir outputs/analysis

Needs `pip install '.[training,analysis]'`. The same command continues a run that was stopped or killed, and measures
nothing twice; another setting measures anew what depends on it. It is the same as the command `maetok-analyze`.
"""

from maetok_hf.commands.analyze_latents import main


if __name__ == "__main__":
    main()
