"""Settings of the tokenizer's recipe that no other test of recipes speaks of."""

import pytest

from maetok_hf.training.tokenizer_recipe import TokenizerRecipe


@pytest.mark.parametrize("name", ["diffaugment_probability", "diffaugment_cutout"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_strength_of_augmentation_is_a_fraction(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must lie in \[0, 1\], got {value}"):
        TokenizerRecipe(**{name: value})


@pytest.mark.parametrize(
    ("settings", "reasons"),
    [
        ({}, {}),
        ({"diffaugment": ["color"]}, {"diffaugment_cutout": "'cutout' is not in `diffaugment`"}),
        (
            {"diffaugment": [], "consistency_weight": 0.0},
            {
                "diffaugment_probability": "`diffaugment` is empty",
                "diffaugment_cutout": "'cutout' is not in `diffaugment`",
            },
        ),
        (
            {"adversarial_weight": 0.0},
            dict.fromkeys(
                ("diffaugment", "diffaugment_probability", "diffaugment_cutout"), "`adversarial_weight` is 0"
            ),
        ),
    ],
)
def test_strength_of_augmentation_is_named_where_nothing_reads_it(settings, reasons):
    unused = TokenizerRecipe(**settings).unused_settings()
    assert {name: reason for name, reason in unused.items() if name.startswith("diffaugment")} == reasons


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.4])
@pytest.mark.parametrize("target", ["hog", "dinov2", "siglip", "text"])
def test_a_target_without_weight_is_refused_with_and_without_a_discriminator(target, adversarial_weight):
    settings = {"auxiliary_targets": [target], f"{target}_weight": 0.0, "adversarial_weight": adversarial_weight}
    with pytest.raises(ValueError, match=f"`{target}_weight` is 0, but '{target}' is one of the `auxiliary_targets`"):
        TokenizerRecipe(**settings)


@pytest.mark.parametrize("name", ["in_channels", "out_channels"])
def test_a_tokenizer_is_trained_on_three_channels(name):
    TokenizerRecipe(model={name: 3})
    with pytest.raises(ValueError, match=f"`model` sets '{name}' to 4, but the images of a training have 3 channels"):
        TokenizerRecipe(model={name: 4})


def test_fine_tuning_of_as_many_steps_as_the_fall_ends_without_masks():
    recipe = TokenizerRecipe(stage="decoder_finetuning", mask_ratio_decay_steps=50_000, max_train_steps=50_000)
    ratios = [recipe.mask_ratio_at(step, 0) for step in (0, 49_998, 49_999, 50_000)]
    assert ratios[0] == 0.6 and ratios[1] > 0 and ratios[2:] == [0.0, 0.0]
