"""Package metadata. The versions are lower bounds; upper ones stand only for known-bad releases."""

import setuptools

setuptools.setup(
    name="ftjax",
    version="0.1.0",
    description="Fine-tuning and alignment of language models as transforms of parameter trees, in JAX and Flax.",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["ftjax", "ftjax.*"]),
    package_data={"ftjax.rewards": ["*.txt"]},
    entry_points={"console_scripts": ["ftjax = ftjax.cli.main:main"]},
    install_requires=[
        "absl-py>=2.1",
        "datasets>=3.0",
        "etils>=1.9",
        "flax>=0.12",
        "gguf>=0.17",
        "huggingface_hub>=0.30",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "jinja2>=3.1.6",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "psutil>=6.0",
        "pyarrow>=17",
        "rich>=13.9",
        "safetensors>=0.5",
        "tensorboardX>=2.6",
        "tokenizers>=0.21",
        "transformers>=4.56",
    ],
    extras_require={
        "test": [
            "beartype>=0.20",
            "chex>=0.1.90",
            "hypothesis>=6.120",
            "jsonschema>=4.18",
            "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'",  # compiles for a TPU without one
            "math-verify>=0.8",
            "outlines-core>=0.2.11",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff==0.17.6",
        ],
        "grammar": ["outlines-core>=0.2.11"],
        "json": ["jsonschema>=4.18"],
        "maths": ["math-verify>=0.8"],
        "reasoning": ["reasoning-gym>=0.1.20"],  # one of its dependencies has no wheel: needs a C compiler
        "gcs": ["etils[epath-gcs]"],
        "wandb": ["wandb"],
    },
)
