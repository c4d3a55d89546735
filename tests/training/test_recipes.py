"""Recipes: one spelling for every setting, and nothing accepted that has no effect."""

import argparse
import dataclasses
import warnings
from pathlib import Path

import pytest

from maetok_hf.training.configuration import add_flags, build, check_value, field_help, given_flags, read_yaml
from maetok_hf.training.lora_recipe import LoraRecipe, LoraRunOptions
from maetok_hf.training.recipes import load_recipe, parse_arguments, recipe_to_dict
from maetok_hf.training.run_options import RunOptions, SiTRunOptions, TokenizerRunOptions
from maetok_hf.training.sit_recipe import SiTRecipe
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SETTINGS = [TokenizerRecipe, SiTRecipe, LoraRecipe, TokenizerRunOptions, SiTRunOptions, LoraRunOptions]


def make_parser():
    return argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)


@pytest.fixture
def write(tmp_path):
    def write_recipe(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write_recipe


def recipe_class(path):
    words = set(path.stem.split("-"))
    if "lora" in words:
        return LoraRecipe
    return SiTRecipe if words & {"sit", "lightningdit", "usit"} else TokenizerRecipe


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_begins_with_its_expected_result_and_cost(path):
    recipe = load_recipe(recipe_class(path), path)
    comments = path.read_text().splitlines()
    assert comments[0].startswith("# Expected: ")
    (cost,) = [line for line in comments[:5] if line.startswith("# Cost: ")]
    assert any(character.isdigit() for character in cost) and "COST" not in cost
    assert recipe.max_train_steps > recipe.lr_warmup_steps


@pytest.mark.parametrize(
    "path",
    sorted(path for path in RECIPES.rglob("*.yaml") if recipe_class(path) is not LoraRecipe),
    ids=lambda path: path.stem,
)
def test_shipped_recipe_builds_its_model(path):
    import torch

    from maetok_hf.models.autoencoder_mae import AutoencoderMAE

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if recipe_class(path) is SiTRecipe:
            recipe = load_recipe(SiTRecipe, path)
            model = recipe.transformer_class(**recipe.model)
            assert recipe.finetuning or model.config.num_layers == recipe.model["num_layers"]
        else:
            recipe = load_recipe(TokenizerRecipe, path)
            model = AutoencoderMAE(sample_size=recipe.resolution, **recipe.model)
            assert model.config.sample_size == recipe.resolution


def test_published_tokenizer_recipe_has_the_published_optimisation():
    recipe = load_recipe(TokenizerRecipe, RECIPES / "maetok-b-128-256.yaml")
    assert (recipe.total_batch_size, recipe.max_train_steps, recipe.lr_warmup_steps) == (512, 500_000, 10_000)
    assert (recipe.learning_rate, recipe.scale_learning_rate, recipe.lr_scheduler) == (1e-4, True, "cosine")
    assert (recipe.adam_beta1, recipe.adam_beta2, recipe.weight_decay, recipe.ema_decay) == (0.9, 0.95, 1e-4, 0.9999)


def test_dataclass_defaults_are_the_published_recipe():
    defaults = recipe_to_dict(TokenizerRecipe()) | {"model": None}
    published = recipe_to_dict(load_recipe(TokenizerRecipe, RECIPES / "maetok-b-128-256.yaml")) | {"model": None}
    assert defaults == published


def test_unknown_key_is_an_error_that_names_the_closest_one(write):
    with pytest.raises(ValueError, match=r"Unknown setting 'learning_rat'.*did you mean 'learning_rate'"):
        load_recipe(TokenizerRecipe, write("learning_rat: 1.0e-4\n"))


def test_key_of_the_other_recipe_is_unknown(write):
    with pytest.raises(ValueError, match="mask_ratio_min"):
        load_recipe(SiTRecipe, write("mask_ratio_min: 0.4\n"))


def test_unknown_model_key_is_an_error_that_names_the_closest_one(write):
    with pytest.raises(ValueError, match=r"'hidden_sizes'.*AutoencoderMAE lacks; did you mean 'hidden_size'"):
        load_recipe(TokenizerRecipe, write("model: {hidden_sizes: 12}\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_train_steps: many\n", r"`max_train_steps` must be of type `int`, got 'many'"),
        ("max_train_steps: 10.5\n", r"`max_train_steps` must be of type `int`"),
        ("max_train_steps: true\n", r"`max_train_steps` must be of type `int`, got True"),
        ("learning_rate: fast\n", r"`learning_rate` must be a number, got 'fast'"),
        ("learning_rate: true\n", r"`learning_rate` must be of type `float`, got True"),
        ("random_flip: 1\n", r"`random_flip` must be of type `bool`"),
        ("crop: middle\n", r"`crop` must be one of 'center', 'random', got 'middle'"),
        ("auxiliary_targets: hog\n", r"`auxiliary_targets` must be a list"),
        ("auxiliary_targets: [hog, hgo]\n", r"`auxiliary_targets` must be one of 'hog', .*got 'hgo'"),
        ("auxiliary_targets: [hog, hog]\n", r"twice"),
        (
            "mixed_resolutions: [128, 512]\n",
            r"`mixed_resolutions` must contain `resolution`, got \[128, 512\] and 256",
        ),
        ("mixed_resolutions: [256, 512]\nmixed_resolution_weights: [1]\n", r"one weight for each"),
        ("mixed_resolutions: [256, 512]\nmixed_resolution_weights: [1, 0]\n", r"must be positive, got \[1.0, 0.0\]"),
        ("mixed_resolutions: [256, 512]\nauxiliary_num_layers: 0\n", r"a linear decoder, is tied to one image size"),
        ("perceptual_weight: -1\n", r"`perceptual_weight` must be 0 or more, got -1.0"),
        ("adversarial_start_step: -1\n", r"`adversarial_start_step` must be 0 or more, got -1"),
        ("max_train_steps: 20000\n", r"`adversarial_start_step` = 30000 is not before the end of the run"),
        (
            "diffaugment: []\n",
            r"`consistency_weight` compares two .*, but `diffaugment` is empty",
        ),
        ("auxiliary_hidden_size: 100\n", r"`auxiliary_hidden_size` \(100\) must be"),
        ("auxiliary_targets: [text]\nauxiliary_num_layers: 0\n", r"cannot predict 'text'"),
        ("mask_ratio_mean: 0.0\nmask_ratio_std: 0.01\n", r"has no mass in"),
        ("hog_weight: .inf\n", r"`hog_weight` must be finite, got inf"),
        ("weight_decay: .inf\n", r"`weight_decay` must be finite, got inf"),
        ("learning_rate: .inf\n", r"`learning_rate` must be finite, got inf"),
        ("discriminator_learning_rate: .inf\n", r"`discriminator_learning_rate` must be finite, got inf"),
        (
            "model: {position_embedding: absolute, rope_theta: 5.0}\n",
            r"sets 'rope_theta' to 5.0, but has no rotary positions",
        ),
        (
            "auxiliary_targets: [text]\nmixed_resolutions: [256, 512]\nmodel: {num_latent_tokens: 0}\n",
            r"different numbers of image tokens",
        ),
        ("lecam_decay: 1.0\n", r"`lecam_decay` must lie in \[0, 1\), got 1.0"),
        ("model: 3\n", r"`model` must be of type `dict`"),
        ("model: {hidden_size: wide}\n", r"`model: hidden_size` must be of type `int`, got 'wide'"),
        ("model: {sample_size: 32}\n", r"must not set 'sample_size': it is determined by `resolution`"),
        ("learning_rate: 0\n", r"`learning_rate` must be positive, got 0.0"),
        ("learning_rate: .nan\n", r"`learning_rate` must be positive, got nan"),
        ("ema_decay: 1.0\n", r"`ema_decay` must lie in \[0, 1\), got 1.0"),
        ("mask_ratio_min: 0.7\n", r"`mask_ratio_min` must not exceed `mask_ratio_max`, got 0.7 and 0.6"),
        ("mask_ratio_max: 1.5\n", r"`mask_ratio_max` must lie in \[0, 1\], got 1.5"),
        ("seed: 1\nseed: 2\n", r"the key 'seed' is given twice"),
        ("- a\n", r"must hold `name: value` lines"),
        ("a: [\n", r"not valid YAML"),
    ],
)
def test_bad_value_is_an_error_that_names_it(write, text, message):
    path = write(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(TokenizerRecipe, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("stage: decoder_finetuning\nmask_ratio_mean: 0.5\n", "mask_ratio_mean"),
        ("stage: decoder_finetuning\nhog_weight: 1.0\n", "hog_weight"),
        ("stage: decoder_finetuning\nkl_weight: 1.0\n", "kl_weight"),
        ("mask_ratio_start: 0.5\n", "mask_ratio_start"),
        ("kl_weight: 0.1\n", "kl_weight"),
        ("auxiliary_targets: []\nhog_weight: 1.0\n", "hog_weight"),
        ("auxiliary_targets: []\nauxiliary_num_layers: 1\n", "auxiliary_num_layers"),
        ("auxiliary_targets: [hog]\ndinov2_model: x\n", "dinov2_model"),
        ("auxiliary_targets: [hog]\nteacher_loss: mse\n", "teacher_loss"),
        ("text_length: 5\n", "text_length"),
        ("auxiliary_num_layers: 0\nauxiliary_hidden_size: 96\n", "auxiliary_hidden_size"),
        ("lr_scheduler: constant\nfinal_learning_rate_fraction: 0.1\n", "final_learning_rate_fraction"),
        ("perceptual_weight: 0\nperceptual_network: alex\n", "perceptual_network"),
        ("adversarial_weight: 0\nadversarial_loss: hinge\n", "adversarial_loss"),
        ("adversarial_weight: 0\ndiffaugment: [color]\n", "diffaugment"),
        ("adversarial_weight: 0\nconsistency_weight: 1\n", "consistency_weight"),
        ("lecam_weight: 0\nlecam_decay: 0.5\n", "lecam_decay"),
        ("mask_ratio_density: uniform\nmask_ratio_mean: 0.5\n", "mask_ratio_mean"),
        ("mask_ratio_min: 0.5\nmask_ratio_max: 0.5\nmask_ratio_std: 0.5\n", "mask_ratio_std"),
        ("mixed_resolution_weights: [3]\n", "mixed_resolution_weights"),
        ("mixed_resolutions: [256]\nmixed_resolution_weights: [3]\n", "mixed_resolution_weights"),
        ("mixed_resolutions: [256]\nmixed_resolution_weights: [1, 2]\n", "mixed_resolution_weights"),
    ],
)
def test_setting_without_effect_is_an_error(write, text, name):
    with pytest.raises(ValueError, match=f"`{name}` is set but has no effect"):
        load_recipe(TokenizerRecipe, write(text))


def test_setting_without_effect_is_an_error_as_a_flag_too(write):
    with pytest.raises(ValueError, match="`kl_weight` is set but has no effect"):
        load_recipe(TokenizerRecipe, write("resolution: 32\n"), {"kl_weight": 0.5})


def test_a_recipe_extends_another_and_holds_what_differs(write, tmp_path):
    (tmp_path / "base.yaml").write_text(
        "resolution: 64\nkl_weight: 0.5\nmodel: {gaussian_posterior: true, num_layers: 2}\n"
    )
    path = write("extends: base\nlearning_rate: 1.0e-3\nmodel: {num_layers: 3}\n")
    recipe = load_recipe(TokenizerRecipe, path)
    assert (recipe.resolution, recipe.learning_rate, recipe.kl_weight) == (64, 1e-3, 0.5)
    assert recipe.model == {"gaussian_posterior": True, "num_layers": 3}


def test_inherited_setting_that_has_lost_its_effect_takes_its_default(write, tmp_path):
    (tmp_path / "base.yaml").write_text("hog_weight: 0.5\nauxiliary_num_layers: 1\n")
    path = write("extends: base\nauxiliary_targets: []\n")
    assert load_recipe(TokenizerRecipe, path) == TokenizerRecipe(auxiliary_targets=[])
    assert load_recipe(TokenizerRecipe, tmp_path / "base.yaml", {"auxiliary_targets": []}) == TokenizerRecipe(
        auxiliary_targets=[]
    )


def test_a_mixed_recipe_can_be_run_at_one_size():
    path = RECIPES / "maetok-b-128-mixed.yaml"
    for sizes in ([], [256]):
        recipe = load_recipe(TokenizerRecipe, path, {"mixed_resolutions": sizes})
        assert (recipe.training_resolutions, recipe.mixed_resolution_weights) == ([256], [])


def test_recipe_that_extends_itself_is_an_error(write, tmp_path):
    (tmp_path / "other.yaml").write_text("extends: recipe\n")
    with pytest.raises(ValueError, match="extends itself"):
        load_recipe(TokenizerRecipe, write("extends: other\n"))
    with pytest.raises(ValueError, match="`extends` must be the name of another recipe, got 3"):
        load_recipe(TokenizerRecipe, write("extends: 3\n"))


def test_ablation_is_found_by_its_name_below_the_folder():
    words = ["--recipe", "ablations/autoencoder", "--output_dir", "o"]
    recipe, options = parse_arguments(make_parser(), TokenizerRecipe, TokenizerRunOptions, RECIPES, words)
    assert (recipe.auxiliary_targets, recipe.mask_ratio_max, recipe.max_train_steps) == ([], 0.0, 250_000)
    assert options.dataset_name == "ILSVRC/imagenet-1k"


@pytest.mark.parametrize("path", sorted((RECIPES / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_ablation_differs_from_the_setting_of_the_ablations_only_in_what_it_says(path):
    import yaml

    said = yaml.safe_load(path.read_text()).keys() - {"extends"}
    base = "maetok-b-128-256.yaml" if path.stem == "base" else "ablations/base.yaml"
    base = "maetok-b-128-mixed.yaml" if path.stem.startswith("mixed") else base
    one, other = (recipe_to_dict(load_recipe(TokenizerRecipe, file)) for file in (path, RECIPES / base))
    assert said and {name for name in one if one[name] != other[name]} >= said - {"text_tokenizer", "text_length"} - {
        "text_weight",
        "kl_weight",
    }
    unused = load_recipe(TokenizerRecipe, path).unused_settings()
    assert {name for name in one if one[name] != other[name]} <= said | unused.keys()


def test_pixel_terms_warm_up_and_start_when_the_recipe_says():
    recipe = TokenizerRecipe(perceptual_warmup_steps=4, adversarial_start_step=2, adversarial_warmup_steps=2)
    scales = [recipe.loss_scales_at(step) for step in range(5)]
    assert [scale["perceptual"] for scale in scales] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [scale["adversarial"] for scale in scales] == [0.0, 0.0, 0.5, 1.0, 1.0]
    at_once = TokenizerRecipe(perceptual_warmup_steps=0, adversarial_start_step=0)
    assert at_once.loss_scales_at(0) == {"perceptual": 1.0, "adversarial": 1.0}


def test_a_cosine_ends_at_its_fraction_of_the_peak():
    recipe = TokenizerRecipe(final_learning_rate_fraction=0.1)
    assert recipe.learning_rate_at(recipe.max_train_steps) == pytest.approx(0.1 * recipe.peak_learning_rate)


def test_discriminator_has_the_schedule_of_the_tokenizer_at_its_own_rate():
    recipe = TokenizerRecipe(learning_rate=1e-3, discriminator_learning_rate=1e-4, scale_learning_rate=False)
    for step in (0, 5_000, 400_000):
        assert recipe.discriminator_learning_rate_at(step) == pytest.approx(0.1 * recipe.learning_rate_at(step))


def test_decoder_finetuning_takes_no_model_section(write):
    with pytest.raises(ValueError, match="`model` must be empty"):
        load_recipe(TokenizerRecipe, write("stage: decoder_finetuning\nmodel: {hidden_size: 96}\n"))


def test_yaml_number_without_a_dot_is_a_number(write):
    assert load_recipe(TokenizerRecipe, write("learning_rate: 3e-4\n")).learning_rate == 3e-4


def test_missing_file_is_an_error_that_names_a_similar_one(tmp_path):
    (tmp_path / "maetok-b.yaml").write_text("seed: 0")
    with pytest.raises(ValueError, match=r"no recipe file .*maetok_b.yaml.*did you mean 'maetok-b'"):
        read_yaml(tmp_path / "maetok_b.yaml")


@pytest.mark.parametrize("cls", SETTINGS)
def test_every_value_is_also_a_flag(cls):
    """Typed as its own default, or as one of its choices."""
    flags = {}
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if isinstance(default, dict) or default in (None, [], dataclasses.MISSING):
            continue
        flags[field.name] = [str(value) for value in default] if isinstance(default, list) else [str(default)]
    assert len(flags) > 10
    parser = make_parser()
    add_flags(parser, cls, "all")
    words = [word for name, values in flags.items() for word in (f"--{name}", *values)]
    given = given_flags(parser.parse_args(words), cls)
    for field in dataclasses.fields(cls):
        if field.name in flags:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            assert given[field.name] == default, field.name


def test_unknown_choice_in_a_list_is_refused(capsys):
    parser = make_parser()
    add_flags(parser, TokenizerRecipe, "all")
    with pytest.raises(SystemExit):
        parser.parse_args(["--auxiliary_targets", "hog", "pog"])
    assert "invalid choice: 'pog'" in capsys.readouterr().err


def test_flags_override_the_file_and_nothing_else(write):
    path = write("resolution: 64\nlearning_rate: 1.0e-3\nmodel: {hidden_size: 96, num_layers: 2}\n")
    plain = load_recipe(TokenizerRecipe, path)
    words = "--learning_rate 2e-3 --random_flip false --auxiliary_targets --model num_layers=5 latent_channels=4"
    recipe, _ = parse_arguments(
        make_parser(),
        TokenizerRecipe,
        TokenizerRunOptions,
        path.parent,
        ["--recipe", str(path), "--output_dir", "out", "--dataset_name", "data", *words.split()],
    )
    changed = {key for key, value in recipe_to_dict(recipe).items() if value != recipe_to_dict(plain)[key]}
    assert changed == {"learning_rate", "random_flip", "auxiliary_targets", "model"}
    assert recipe.learning_rate == 2e-3
    assert recipe.random_flip is False
    assert recipe.auxiliary_targets == []
    assert recipe.model == {"hidden_size": 96, "num_layers": 5, "latent_channels": 4}


def test_recipe_is_found_by_its_bare_name():
    words = ["--recipe", "demo-sit", "--output_dir", "o", "--dataset_name", "d", "--tokenizer_name_or_path", "t"]
    recipe, options = parse_arguments(make_parser(), SiTRecipe, SiTRunOptions, RECIPES, words)
    assert recipe == load_recipe(SiTRecipe, RECIPES / "demo-sit.yaml")
    assert options == SiTRunOptions(output_dir="o", dataset_name="d", tokenizer_name_or_path="t")
    assert parse_arguments(make_parser(), SiTRecipe, SiTRunOptions, RECIPES, ["--recipe", "demo-sit.yaml", *words[2:]])


def test_recipe_given_by_a_path_is_not_looked_up_elsewhere(tmp_path, capsys):
    words = ["--recipe", str(tmp_path / "demo-sit"), "--output_dir", "o", "--dataset_name", "d"]
    with pytest.raises(SystemExit):
        parse_arguments(make_parser(), SiTRecipe, SiTRunOptions, RECIPES, [*words, "--tokenizer_name_or_path", "t"])
    assert "There is no recipe file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "unrecognized arguments: --learning_rat"),
        (["--learning", "1"], "unrecognized arguments: --learning"),
        (["--max_train_steps", "1.5"], "--max_train_steps: invalid int value"),
        (["--random_flip", "no"], "--random_flip"),
        (["--model", "hidden_size"], "takes KEY=VALUE words, got 'hidden_size'"),
        (["--seed", "x"], "--seed: invalid int value"),
        (["--checkpointing_steps", "0"], "`checkpointing_steps` must be at least 1, got 0"),
        (["--ema_decay", "2"], "`ema_decay` must lie in"),
        (["--num_validation_images", "5"], "has no effect without `validation_split`"),
        (["--validation_steps", "5"], "has no effect without `validation_split`"),
        (["--hub_model_id", "me/it"], "`hub_model_id` = 'me/it' has no effect without `push_to_hub`"),
        (["--max_skipped_steps", "0"], "`max_skipped_steps` must be at least 1, got 0"),
        (["--num_validation_images", "0", "--validation_split", "test"], "`num_validation_images` must be at least 1"),
    ],
)
def test_bad_flag_ends_the_script_with_a_message(capsys, words, message):
    base = ["--recipe", "demo-tokenizer", "--output_dir", "out", "--dataset_name", "data"]
    with pytest.raises(SystemExit) as caught:
        parse_arguments(make_parser(), TokenizerRecipe, TokenizerRunOptions, RECIPES, base + words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("cls", SETTINGS)
def test_every_field_has_one_flag_with_its_docstring_entry_as_help(cls):
    parser = make_parser()
    add_flags(parser, cls, "settings")
    flags = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert flags.keys() == {field.name for field in dataclasses.fields(cls)}
    for name, text in field_help(cls).items():
        if name in flags:
            assert len(text) > 15
            assert flags[name].help.replace("%%", "%") == text
    parser.format_help()


def test_help_names_defaults_where_no_file_gives_others():
    parser = make_parser()
    add_flags(parser, RunOptions, "settings", defaults=True)
    helps = {action.dest: action.help for action in parser._actions}
    assert helps["seed"].endswith(" Default: 0.") and helps["output_dir"].endswith(" Required.")


def test_flag_that_is_not_typed_is_not_given():
    parser = make_parser()
    add_flags(parser, RunOptions, "run")
    assert given_flags(parser.parse_args(["--seed", "7"]), RunOptions) == {"seed": 7}


def test_parser_that_would_invent_values_is_refused():
    with pytest.raises(ValueError, match="SUPPRESS"):
        add_flags(argparse.ArgumentParser(), RunOptions, "run")


def test_missing_required_value_is_an_error():
    with pytest.raises(ValueError, match="RunOptions needs a value for 'dataset_name'"):
        build(RunOptions, {"output_dir": "out"})


def test_undescribed_field_is_an_error():
    @dataclasses.dataclass
    class Undescribed:
        """
        Args:
            first (`int`): The first.
        """

        first: int = 1
        second: int = 2

    with pytest.raises(ValueError, match="second"):
        field_help(Undescribed)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [(None, int | None, None), (3, int | None, 3), (2, float, 2.0), ([1.0, 2], float | list[float], [1.0, 2.0])],
)
def test_value_is_given_in_the_annotated_type(value, annotation, expected):
    result = check_value("x", value, annotation)
    assert result == expected
    assert type(result) is type(expected)


def test_none_is_refused_where_it_is_not_allowed():
    with pytest.raises(ValueError, match="`x` must be of type `int`, got None"):
        check_value("x", None, int)


@pytest.mark.parametrize("cls", [TokenizerRunOptions, SiTRunOptions, LoraRunOptions])
def test_validation_that_a_run_never_comes_to_is_named(cls):
    given = {"validation_split": "test"} if cls is TokenizerRunOptions else {}
    given |= {"tokenizer_name_or_path": "t"} if cls is SiTRunOptions else {}
    given |= {"pretrained_model_name_or_path": "p"} if cls is LoraRunOptions else {}
    options = cls(output_dir="o", dataset_name="d", validation_steps=8, **given)
    assert options.unused_settings(9) == {}
    assert dataclasses.replace(options, validation_steps=None).unused_settings(1) == {}
    for steps in (7, 8):
        reason = f"the run has {steps} steps, and is validated at its end in any case"
        assert options.unused_settings(steps) == {"validation_steps": reason}


def test_micro_batch_is_the_total_divided_by_processes_and_accumulation():
    options = RunOptions(output_dir="o", dataset_name="d", gradient_accumulation_steps=4)
    assert options.micro_batch_size(64, num_processes=2) == 8
    with pytest.raises(ValueError, match=r"`total_batch_size` = 60 must be a multiple of .*2 x 4"):
        options.micro_batch_size(60, num_processes=2)
