"""A finished run without its notebooks, made in the course folder that it is called in."""

import json

import lib
from lib import cohort, intake, preparation, scoring
from lib.preprocessing import Recipe

FITS = {"size": 48, "pixel_mm": 4.0}
METHODS = ("intensity_median", "blur")


def write(run="small"):
    gathered = intake.gather(str(lib.ROOT / "scans"), **FITS)
    cohort.announce(run, preparation.prepare_cohort(gathered, Recipe(**FITS)), gathered)
    for method in METHODS:
        scoring.run_detector(method, cohort.of_run(run), run)
    record = {"run": run, "status": "done", "settings": {}, "notebooks": {}}
    (lib.run_folder(run) / "run.json").write_text(json.dumps(record))


if __name__ == "__main__":
    write()
