"""Draw the pictures of the README, of a run of the quickstart and of the plan of a larger job.

python docs/pictures/draw.py runs/quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

from ray_train_geo import plan
from ray_train_geo.observe.pictures import loss_curve, pipeline_timeline, plan_picture, to_png
from ray_train_geo.observe.run_directory import RunDirectory

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = RunDirectory.open(Path(sys.argv[1]))
    three_regions = plan(
        EXAMPLES / "gpt3-xl.yaml", topology=EXAMPLES / "topologies" / "three-regions.yaml"
    )
    for name, figure in {
        "timeline": pipeline_timeline(run.read_json("trace.json")),
        "loss": loss_curve(run.metrics(), run.events()),
        "three-regions": plan_picture(three_regions.to_json()),
    }.items():
        (HERE / f"{name}.png").write_bytes(to_png(figure, dots_per_inch=110))


if __name__ == "__main__":
    main()
