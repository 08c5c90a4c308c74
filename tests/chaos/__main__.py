"""`make chaos`: kill everything at random and see whether it makes a difference.

The last line sums up. Exit code 0: no byte of any dataset or weight differs, no row was lost or repeated.
"""

import argparse
import sys

from chaos.campaign import Options, campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="faults, all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="of faults, victims and pauses")
    parser.add_argument("--store", choices=["local", "moto", "ceph"], default="local")
    parser.add_argument("--source", choices=["light", "lm"], default="light")
    parser.add_argument("--keep", action="store_true", help="keep the work directories")
    result = campaign(Options(**vars(parser.parse_args())))
    print(result.line(), flush=True)
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
