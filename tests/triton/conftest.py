"""interpreted/ runs in its own process with TRITON_INTERPRET=1: Triton reads the flag when a kernel is decorated."""

import os

from numerics import nan_outputs

__all__ = ["nan_outputs"]
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
