"""Packaging of maetok_hf; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "src/maetok_hf/__init__.py").read_text(encoding="utf-8"), re.M)[
    1
]

# Lower bounds, no pins: users choose their torch build. Golden outputs were checked at the bound of diffusers, too.
INSTALL_REQUIRES = [
    "accelerate>=1.8",
    "diffusers>=0.41",
    "huggingface-hub>=1.5",
    "numpy>=1.26",
    "pillow>=10",
    "safetensors>=0.4",
    "torch>=2.6",
]
EXTRAS = {
    "training": [
        "datasets>=4.0",
        "lpips>=0.1.4",
        "pyyaml>=6",
        "tensorboard>=2.16",
        "timm>=1.0.15",
        "torchmetrics>=1.4",
        "torchvision>=0.21",
        "tqdm>=4.66",
        "transformers>=5",
    ],
    "conversion": ["timm>=1.0.15"],  # the names of ImageNet's classes
    "lora": ["peft>=0.17", "transformers>=5"],
    "quantization": ["torchao>=0.18"],  # before, diffusers could not save its int8 weights
}
EXTRAS["evaluation"] = [*EXTRAS["training"], "evaluate>=0.4.6", "matplotlib>=3.8", "torch-fidelity>=0.4"]
EXTRAS["analysis"] = [*EXTRAS["training"], "matplotlib>=3.8", "umap-learn>=0.5.7"]
EXTRAS["demo"] = [*EXTRAS["training"], "mlxtend>=0.23", "scikit-learn>=1.5"]
EXTRAS["page"] = [*EXTRAS["training"], "gradio>=6.31,<7", "matplotlib>=3.8"]
EXTRAS["study"] = [*EXTRAS["demo"], *EXTRAS["evaluation"], "scipy>=1.11"]
EXTRAS["docs"] = [*EXTRAS["training"], "furo>=2025.12", "myst-parser>=5", "sphinx>=9"]
EXTRAS["dev"] = [
    *EXTRAS["analysis"],
    *EXTRAS["docs"],
    *EXTRAS["lora"],
    *EXTRAS["page"],
    *EXTRAS["quantization"],
    *EXTRAS["study"],
    "playwright>=1.50",  # drives Debian's chromium in the tests of the page
    "piq>=0.8",  # other implementations of metrics, which tests compare with
    "prdc>=0.2",
    "scikit-image>=0.24",
    "codespell>=2.3",
    # pytest 10 drops the class-scoped instance fixtures that diffusers' test mixins use
    "pytest>=8,<10",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
]

setup(
    name="maetok_hf",
    version=VERSION,
    description="MAETok 1D image tokenizers and diffusion models on their latents, native to diffusers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "maetok_hf": [
            "py.typed",
            "conversion/*.md",
            "models/*.md",
            "metrics/*/README.md",
            "metrics/*/requirements.txt",
            "metrics/*/*.py",
        ]
    },
    entry_points={
        "console_scripts": [
            "maetok-analyze = maetok_hf.commands.analyze_latents:main",
            "maetok-convert = maetok_hf.commands.convert:main",
            "maetok-demo = maetok_hf.commands.demo_page:main",
            "maetok-eval = maetok_hf.commands.evaluate:main",
        ]
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
