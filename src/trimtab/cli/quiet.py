"""Silence what libraries say about themselves, so that what is left is for the user; and import them in less time."""

import gc
import logging
import os
import warnings


def quiet() -> None:
    """Call before a verb's own imports: some of this is read only once."""
    gc.set_threshold(100_000)  # else going through all that they make at import, again and again, takes two seconds
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|transformers|accelerate|datasets|bitsandbytes|PIL")
    warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op")  # of all that is looked at, with inspect
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is raised as well
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
