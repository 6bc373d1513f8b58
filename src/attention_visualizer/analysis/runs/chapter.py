"""Several training runs side by side: what survives another seed, or what goes with a setting."""

from __future__ import annotations

from attention_visualizer.analysis.runs import seeds, settings
from attention_visualizer.analysis.runs.survey import survey_runs
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.data.image_sets import LabelledImageSet
from attention_visualizer.report.chapter import Chapter

TITLE = "Comparing runs"


def write(study: Study) -> Chapter:
    if not study.others:
        return Chapter(TITLE, NO_RUNS)
    if not isinstance(study.pictures, LabelledImageSet) or study.pictures.labels is None:
        return Chapter(TITLE, NO_LABELS)
    looked = survey_runs(study)
    if len({each.run.setting for each in looked}) == 1:
        return seeds.write(study, looked)
    return settings.write(study, looked)


NO_RUNS = """No other run was looked at: `python analyze.py runs=<glob>`, such as `runs='runs/*'` or a sweep's folder,
compares several seeds of one model, or the jobs of a sweep."""

NO_LABELS = """Runs are compared on a test set with known classes, which these pictures are not."""
