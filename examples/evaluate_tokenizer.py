"""Reconstruct held-out images by any autoencoder of diffusers, and measure rFID, PSNR, SSIM and LPIPS.

The published protocol, 50 000 validation images of ImageNet at 256 pixels (log in first: the data set is gated), by 8
processes:

    accelerate launch --num_processes 8 --mixed_precision no examples/evaluate_tokenizer.py \
        --tokenizer_name_or_path outputs/maetok-b-128-decoder --dataset_name ILSVRC/imagenet-1k \
        --lpips vgg --batch_size 64 --dataloader_num_workers 4 --output_dir outputs/maetok-reconstruction

Another tokenizer on the same images, whose statistics are there by now:

    python examples/evaluate_tokenizer.py --tokenizer_name_or_path stabilityai/sd-vae-ft-ema \
        --dataset_name ILSVRC/imagenet-1k --reference outputs/maetok-reconstruction/originals.npz \
        --output_dir outputs/sd-vae-reconstruction

A folder of images of one size, without any weights but the tokenizer's:

    python examples/evaluate_tokenizer.py --tokenizer_name_or_path runs/tokenizer --images path/to/folder \
        --extractor none --output_dir outputs/reconstruction

Prints a table and its protocol, and writes both to `reconstruction.json`. rFID compares reconstructions of these
images with the images themselves, never with the statistics of a training set. Reconstructions are rounded to 8 bits
before anything is measured. The same command continues a run that was stopped or killed, and gives the same numbers on
any number of processes. Needs `pip install '.[evaluation]'`. It is the same as the command `maetok-eval tokenizer`.
"""

from maetok_hf.commands.evaluate_tokenizer import main


if __name__ == "__main__":
    main()
