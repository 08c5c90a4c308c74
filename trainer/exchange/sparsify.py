"""sparsify 1.3: `cfg.json` and `sae.safetensors`, as its `SparseCoder.load_from_disk` reads them.

`origin.json` beside them says where the dictionary comes from.
"""

import json
from dataclasses import asdict

import safetensors.torch

from penstock.trainer.exchange.origin import Origin
from penstock.trainer.sae import SAE


def files(sae: SAE, origin: Origin) -> dict[str, bytes]:
    """The files of an export by name.

    Raises:
        NoSuchKind
    """
    there = sae.to_sparsify()
    config = {
        "activation": there.kind,
        "d_in": sae.d_in,
        "num_latents": sae.d_sae,
        # rows of W_dec carry the input scale: training on must not stretch them
        "normalize_decoder": False,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
    } | there.fields
    return {
        "cfg.json": json.dumps(config, indent=2).encode(),
        # it has no place for this, and complains of fields that it does not know
        "origin.json": json.dumps(asdict(origin), indent=2).encode(),
        "sae.safetensors": safetensors.torch.save(there.tensors),
    }
