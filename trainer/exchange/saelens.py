"""SAELens 6: `cfg.json` and `sae_weights.safetensors`, as its `SAE.load_from_disk` reads them.

It takes no tensor more or less than its kind has. The input scale is folded into the weights, hence
`normalize_activations: none`.
"""

import json

import safetensors.torch

from penstock.trainer.exchange.names import CONFIG, WEIGHTS
from penstock.trainer.exchange.origin import Origin
from penstock.trainer.sae import SAE

VERSION = "6.54.0"
"""The version of SAELens whose format this is."""


def files(sae: SAE, origin: Origin) -> dict[str, bytes]:
    """The files of an export by name.

    Raises:
        NoSuchKind
    """
    there = sae.to_saelens()
    metadata = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": origin.model,
        "hook_name": origin.hook_name,
        "context_size": origin.context,
        "prepend_bos": origin.bos,
        "exclude_special_tokens": origin.drop_special,
        "dataset_path": origin.corpus,
        "penstock": {
            "run_id": origin.run_id,
            "sae": origin.sae,
            "model_revision": origin.revision,
            "model_weights_sha256": origin.weights_sha256,
            "corpus_digest": origin.corpus_digest,
        },
    }
    if len(sae.settings.hooks) > 1:
        metadata["hook_name_out"] = sae.settings.hooks[1]
    config = {
        "architecture": there.kind,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if origin.hook_name.endswith("hook_z") else "none",
    }
    return {
        CONFIG: json.dumps(config | there.fields | {"metadata": metadata}, indent=2).encode(),
        WEIGHTS: safetensors.torch.save(there.tensors),
    }
