"""SOAR post-training of rectified-flow transformers on megatron-core. Importing this name alone is cheap."""

import warnings

__version__ = "0.1.0"

# megatron says it at many imports; soar_mega.platform has what is missing then, and `soar-mega doctor` what is there
warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed")
