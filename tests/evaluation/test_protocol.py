"""Every number carries its conditions; what is not known is said to be so."""

import json

import pytest

from maetok_hf.evaluation import EvaluationProtocol
from maetok_hf.evaluation.protocol import without_folders
from maetok_hf.sampling import GenerateOptions, resolve_sampling, sampling_settings
from tests.evaluation.networks import TinyExtractor
from tests.pipelines.helpers import tiny_pipeline


@pytest.fixture(scope="module")
def extractor():
    return TinyExtractor()


def settings(**values):
    given = {"pretrained_model_name_or_path": "x", "output_dir": "y", "num_images": 12, "num_inference_steps": 3}
    options, pipe = GenerateOptions(**given | values), tiny_pipeline()
    classes = list(range(pipe.transformer.config.num_classes))
    found = sampling_settings(options, pipe, classes, resolve_sampling(options, pipe, classes))
    return json.loads(json.dumps(found))


def test_line_states_every_condition(extractor):
    values = settings(guidance_scale=1.9, guidance_interval=(0.0, 0.5), dtype="bfloat16", rounding="truncate")
    known = {"images": "a folder", "size": "32 x 32", "crop": "none", "kid_subsets": "100 of 10"}
    protocol = EvaluationProtocol.of(extractor, "train set", 12, 100, values, **known)
    line = protocol.line()
    for part in (
        "extractor tiny;",
        f"extractor digest {extractor.digest[:12]};",
        "resize none;",
        "reference train set;",
        "num images 12;",
        "num reference images 100;",
        "size 32 x 32; crop none; kid subsets 100 of 10;",
        "weights vae ",
        "seed 0;",
        "labels balanced, all classes of",
        "sampler FlowMatch",
        "num inference steps 3;",
        "guidance cfg 1.9 in [0.0, 0.5];",
        "dtype bfloat16;",
        "rounding truncate",
    ):
        assert part in line
    assert "not stated" not in line


def test_set_without_guidance_says_so(extractor):
    protocol = EvaluationProtocol.of(extractor, "x", 12, None, settings(guidance_scale=1.0))
    assert protocol.guidance == "none"


def test_images_from_elsewhere_state_what_is_not_known(extractor):
    protocol = EvaluationProtocol.of(extractor, "VIRTUAL_imagenet256_labeled.npz", 50000)
    line = protocol.line()
    for name in ("num reference images", "labels", "sampler", "num inference steps", "guidance", "dtype", "rounding"):
        assert f"{name} not stated" in line


def test_protocol_survives_json(extractor):
    protocol = EvaluationProtocol.of(extractor, "x", 12, 5, settings())
    assert EvaluationProtocol(**json.loads(json.dumps(protocol.to_dict()))) == protocol


def test_part_of_a_set_says_so(extractor):
    protocol = EvaluationProtocol.of(extractor, "x", 5, None, settings(), images="folder a")
    assert "images folder a; num images 5;" in protocol.line()
    assert protocol.labels.endswith(", the first images of 12")


def test_numbers_of_images_must_be_positive(extractor):
    with pytest.raises(ValueError, match="`num_images` must be positive, got 0"):
        EvaluationProtocol.of(extractor, "x", 0)
    with pytest.raises(ValueError, match="`num_reference_images` must be positive, got -1"):
        EvaluationProtocol.of(extractor, "x", 1, -1)


@pytest.mark.parametrize(
    "description, public",
    [
        ("folder '/home/me/my images/real'", "folder real"),
        ('folder "/home/me\'s/my images/"', "folder my images"),
        ("file /data/reference.npz, 10 images", "file reference.npz, 10 images"),
        ("the split 'train' of 'user/images'", "the split 'train' of 'user/images'"),
        ("'/a/b' and '/c/d e'", "b and d e"),
    ],
)
def test_descriptions_are_without_the_folders_of_this_machine(description, public):
    assert without_folders(description) == public
