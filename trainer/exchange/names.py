"""Names of the files of a SAELens dictionary."""

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
