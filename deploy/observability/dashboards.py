"""The three dashboards as Grafana's JSON. Writes them: python -m penstock.deploy.observability.dashboards"""

import json
from pathlib import Path

from penstock.deploy.observability.feeding import FEEDING
from penstock.deploy.observability.learning import LEARNING
from penstock.deploy.observability.panels import render
from penstock.deploy.observability.safety import SAFETY

HERE = Path(__file__).parent
FOLDER = HERE / "grafana" / "dashboards"
DASHBOARDS = (LEARNING, FEEDING, SAFETY)


def rendered() -> dict[str, str]:
    """File name -> its text."""
    return {f"{d.name}.json": json.dumps(render(d), indent=1, ensure_ascii=False) + "\n" for d in DASHBOARDS}


def write() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
