"""The Bone family of block-affine adapters for PEFT, transformers and TRL."""

__version__ = "0.1.0"
