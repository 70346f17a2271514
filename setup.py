"""Metadata of vlp_fast. The top-level folders kernels/ and benchmarks/ are installed as vlp_fast.kernels and vlp_fast.benchmarks."""

from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version: dict[str, str] = {}
exec((here / "vlp_fast" / "_version.py").read_text(), version)

extras = {
    "xformers": ["xformers>=0.0.30"],
    "flash-attn": ["flash-attn>=2.7"],
    "report": ["matplotlib>=3.8"],
    "data": ["webdataset>=0.2.100"],
    "demo": ["easy-vqa>=1.0"],
    "test": [
        "hypothesis>=6.100",
        "mypy>=1.10",
        "pytest>=8",
        "pytest-benchmark>=4",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.6",
        "setuptools>=77",
    ],
    # published code that tests/peers compares with; the Makefile installs what pins other versions of these beside them
    "test-peers": ["einops>=0.8", "open-clip-torch>=3.3,<4", "transformers>=5,<6"],
}
# flash-attn has no wheel and needs a CUDA compiler to build: `all` is everything that installs anywhere.
extras["all"] = sorted({need for name, needs in extras.items() if name != "flash-attn" for need in needs})

setup(
    name="vlp_fast",
    version=version["__version__"],
    description="Triton kernels, torch modules and whole BLIP, CoCa, BEiT-3, ALBEF and VLMo models for fast vision-language pretraining",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        "vlp_fast",
        "vlp_fast.benchmarks",
        "vlp_fast.capfilt",
        "vlp_fast.cli",
        "vlp_fast.data",
        "vlp_fast.generation",
        "vlp_fast.kernels",
        "vlp_fast.models",
        "vlp_fast.models.checkpoints",
        "vlp_fast.modules",
        "vlp_fast.ops",
        "vlp_fast.profiling",
        "vlp_fast.training",
    ],
    package_dir={"vlp_fast": "vlp_fast", "vlp_fast.benchmarks": "benchmarks", "vlp_fast.kernels": "kernels"},
    package_data={"vlp_fast": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "pillow>=12.0",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "typer>=0.12",
        "rich>=13",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["vlp-fast = vlp_fast.cli:app"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
