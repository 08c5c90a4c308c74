"""dictionary_learning 0.1: `ae.pt` and `config.json`, as its `load_dictionary` reads them.

The format demands a pickle. It is written from plain tensors, and none is ever read here.
"""

import io
import json
import re

import torch

from penstock.trainer.exchange.origin import Origin
from penstock.trainer.sae import SAE


def files(sae: SAE, origin: Origin) -> dict[str, bytes]:
    """The files of an export by name.

    Raises:
        NoSuchKind
    """
    there = sae.to_dictionary_learning()
    weights = io.BytesIO()
    torch.save(there.tensors, weights)
    layer = re.search(r"\d+", origin.hook_name)
    config = {
        "trainer": {
            "dict_class": there.kind,
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            "lm_name": origin.model,
            "layer": int(layer.group()) if layer else None,
            "submodule_name": origin.hook_name,
        }
        | there.fields,
        "buffer": {"d_submodule": sae.d_in, "ctx_len": origin.context},
        "penstock": {"run_id": origin.run_id, "sae": origin.sae},
    }
    return {"config.json": json.dumps(config, indent=2).encode(), "ae.pt": weights.getvalue()}
