"""Several training runs side by side: what survives another seed, or what goes with a setting."""

from __future__ import annotations

from attention_visualizer.analysis import knobs, seeds
from attention_visualizer.analysis.study import Study
from attention_visualizer.analysis.surveyed_runs import look_at_runs
from attention_visualizer.chapter import Chapter
from attention_visualizer.pictures import LabelledImages

TITLE = "Comparing runs"


def write(study: Study) -> Chapter:
    if not study.others:
        return Chapter(TITLE, NO_RUNS)
    if not isinstance(study.pictures, LabelledImages) or study.pictures.labels is None:
        return Chapter(TITLE, NO_LABELS)
    looked = look_at_runs(study)
    if len({each.run.setting for each in looked}) == 1:
        return seeds.write(study, looked)
    return knobs.write(study, looked)


NO_RUNS = """No other run was looked at: `python analyze.py runs=<glob>`, such as `runs='runs/*'` or a sweep's folder,
compares several seeds of one model, or the jobs of a sweep."""

NO_LABELS = """Runs are compared on a test set with known classes, which these pictures are not."""
