"""What someone who may only read does with a dataset: in a process of its own, so that rights can be less.

    python -m services.reading DATASET_URL

The last line of output is a digest of every row.
"""

import contextlib
import hashlib
import sys

import numpy as np

from penstock.common.errors import StoreError
from penstock.deploy.cli import cli
from penstock.store.dataset import open_dataset


def main(url: str) -> None:
    dataset = open_dataset(url)
    try:
        dataset.store.put("written", b"")
    except StoreError as refusal:
        print(f"put: {refusal}")
    else:
        sys.exit("this user may write: nothing is shown")
    hooks = [hook.name for hook in dataset.manifest.hooks]
    digest = hashlib.sha256()
    for index in sorted(dataset.committed()):
        chunk = dataset.read_chunk(index)
        for hook in hooks:
            digest.update(chunk.acts[hook].view(np.uint16).tobytes())
    rows = sum(len(batch[hooks[0]]) for batch in dataset.batches(hooks, batch_rows=100, window_chunks=3))
    assert rows == dataset.manifest.total_rows
    for arguments in (["inspect", url], ["verify", url]):
        with contextlib.suppress(SystemExit):  # `verify` says on its last line what it found
            cli.main(args=arguments, standalone_mode=False)
    print(digest.hexdigest())


if __name__ == "__main__":
    main(sys.argv[1])
