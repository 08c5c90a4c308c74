"""transformers told that everything is here already, and to be quiet."""

import logging
import os


def quiet_transformers() -> None:
    """Set transformers up: no hub, no progress bars, errors only. Imports it."""
    # the files are here; without this a missing optional file means retries against the hub
    os.environ["HF_HUB_OFFLINE"] = "1"

    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.ERROR)
