"""trimtab: parameter-efficient fine-tuning of pretrained PyTorch models. The small surface that turns the ship."""

import lazy_loader

__version__ = "0.1.0"

# The names are in __init__.pyi. Each is imported when it is first asked for: the command line shows its help without
# torch, and models are adapted without transformers.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
