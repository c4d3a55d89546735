"""`import maetok_hf` makes diffusers know the library, once and cheaply."""

import subprocess
import sys

import diffusers
import pytest
from diffusers import AutoModel
from diffusers.hooks._helpers import AttentionProcessorRegistry, TransformerBlockRegistry
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import maetok_hf
from maetok_hf._register import register
from maetok_hf.models.layers import MAETokAttnProcessor, TransformerBlock
from tests.testing_utils import tiny_autoencoder, tiny_transformer


def test_public_names_are_those_of_the_package():
    for name in maetok_hf.__all__:
        assert getattr(maetok_hf, name).__module__.startswith("maetok_hf.")
    assert sorted(maetok_hf.__all__) == maetok_hf.__all__


def test_diffusers_finds_the_classes_by_name():
    names = ("AutoencoderMAE", "SiTTransformer1DModel", "LightningDiTTransformer1DModel", "USiTTransformer1DModel")
    for name in (*names, "MAETokDiffusionPipeline"):
        assert getattr(diffusers, name) is getattr(maetok_hf, name)
    for base in LOADABLE_CLASSES["maetok_hf"]:
        assert getattr(maetok_hf, base) is getattr(diffusers, base)


def test_registering_twice_changes_nothing():
    def tables():
        return (
            dict(LOADABLE_CLASSES["maetok_hf"]),
            set(vars(diffusers)),
            len(TransformerBlockRegistry._registry),
            len(AttentionProcessorRegistry._registry),
        )

    before = tables()
    register()
    assert tables() == before


def test_diffusers_hooks_find_the_block_and_its_processor():
    metadata = TransformerBlockRegistry.get(TransformerBlock)
    assert metadata.return_hidden_states_index == 0
    assert metadata._get_parameter_from_args_kwargs("hidden_states", ("tokens", "conditioning")) == "tokens"
    skip = AttentionProcessorRegistry.get(MAETokAttnProcessor).skip_processor_output_fn
    assert skip(None, "tokens", rotary_emb=None) == "tokens"


@pytest.mark.parametrize("model", [tiny_autoencoder(), tiny_transformer()], ids=lambda model: type(model).__name__)
def test_auto_model_loads_a_model_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(str(tmp_path))) is type(model)


def test_importing_adds_no_heavy_module_to_what_diffusers_loads():
    """The bound on import time, as a law that a busy machine cannot break."""
    code = (
        "import sys; from diffusers import DiffusionPipeline, ModelMixin; before = set(sys.modules); "
        "import maetok_hf; print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    added = result.stdout.split()
    assert {name.split(".")[0] for name in added} == {"diffusers", "maetok_hf"}
    assert not [name for name in added if name.startswith(("maetok_hf.training", "maetok_hf.data"))]
    # diffusers loads its transformers one by one, on demand: its registries would load a dozen
    in_tree = [name for name in added if name.startswith("diffusers.models.transformers.transformer_")]
    assert not in_tree
    assert len(added) < 50


@pytest.mark.parametrize("moved", ["TransformerBlockRegistry", "AttentionProcessorRegistry._registry"])
def test_private_hook_tables_that_moved_do_not_stop_the_rest(moved, monkeypatch):
    monkeypatch.delattr(f"diffusers.hooks._helpers.{moved}")
    monkeypatch.delitem(LOADABLE_CLASSES, "maetok_hf")
    register()
    assert "maetok_hf" in LOADABLE_CLASSES
