"""Options that contradict each other or would be ignored are refused."""

import pytest

from maetok_hf.evaluation.tokenizer_options import TokenizerEvaluationOptions
from maetok_hf.training.configuration import build, field_help


REQUIRED = {"tokenizer_name_or_path": "tokenizer", "output_dir": "out"}


def test_every_option_is_described():
    assert field_help(TokenizerEvaluationOptions)


@pytest.mark.parametrize(
    "given,message",
    [
        ({}, "Give either `dataset_name`, or `images`"),
        ({"dataset_name": "a", "images": "b"}, "Give either `dataset_name`, or `images`"),
        ({"images": "a", "split": "train"}, "`split` = 'train' has no effect with `images`"),
        ({"images": "a", "resolution": 64}, "`resolution` = 64 has no effect with `images`"),
        ({"images": "a", "dataloader_num_workers": 2}, "`dataloader_num_workers` = 2 has no effect"),
        ({"images": "a", "num_images": 1}, "`num_images` must be at least 2, got 1"),
        ({"images": "a", "batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"images": "a", "extractor": "resnet"}, "`extractor` must be 'inception', 'dinov2'.* got 'resnet'"),
        ({"images": "a", "extractor": "a:b", "extractor_weights": "c"}, "`extractor_weights` has no effect"),
        ({"images": "a", "extractor": "none", "reference": "c"}, "`reference` has no effect with `extractor` 'none'"),
        ({"images": "a", "lpips": "resnet"}, "`lpips` must be one of 'vgg', 'alex', 'squeeze'"),
    ],
)
def test_what_cannot_be_done_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        build(TokenizerEvaluationOptions, REQUIRED | given)
