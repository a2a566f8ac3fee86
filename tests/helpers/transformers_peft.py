"""Whether the installed transformers takes the installed peft in methods of its own."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

needs_transformers_own_adapters = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"this transformers' own add_adapter and load_adapter want peft {MIN_PEFT_VERSION}",
)
