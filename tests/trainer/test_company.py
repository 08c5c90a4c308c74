"""Who trains beside an SAE does not matter: sixteen in one run, and each of them alone."""

from penstock.store.dataset import Dataset
from penstock.store.heads import Head
from penstock.trainer.kinds import KINDS
from services import dictionaries
from services.runs import Bench
from services.synthetic import MLP, RESID

HOOKS = {0: RESID, 1: MLP}


def sixteen() -> list[dict[str, object]]:
    """Every kind, on two hook points, with two seeds; features die and are resampled."""
    made = []
    for kind in sorted(KINDS):
        for seed, hook in HOOKS.items():
            told = dictionaries.SETTINGS[kind] | {"hook_name": hook, "seed": seed, "dead_after_rows": 150}
            if kind == "transcoder":
                told["hook_out"] = HOOKS[1 - seed]
            told |= {"resample_every_rows": 300} if seed else {}
            common = {"name": f"{kind}-{seed}", "architecture": kind, "d_sae": 32, "lr": 3e-3}
            made.append(common | told)
    return made


def files(head: Head, name: str) -> dict[str, str]:
    return {file: stored.sha256 for file, stored in head.checkpoint.items() if file.endswith(f"/{name}")}


def test_each_of_sixteen_is_what_it_is_alone(bench: Bench, dataset: Dataset) -> None:
    saes = sixteen()
    assert len(saes) >= 16
    together = bench.submit(dataset, saes=saes)
    alone = {str(sae["name"]): bench.submit(dataset, name=str(sae["name"]), saes=[sae]) for sae in saes}
    bench.work()
    head = bench.head(together)
    assert head.status == "done"
    for name, run in alone.items():
        assert files(bench.head(run), name) == files(head, name), name
        assert len(files(head, name)) == 2
