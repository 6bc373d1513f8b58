"""Several training runs side by side: what survives another seed, or what goes with a setting."""

from __future__ import annotations

from attention_visualizer.analysis.needs import ChapterWriter, Need
from attention_visualizer.analysis.runs.seeds import chapter as seeds_chapter
from attention_visualizer.analysis.runs.settings import chapter as settings_chapter
from attention_visualizer.analysis.runs.surveyed_runs import survey_runs
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.report.chapter import Chapter


def write(study: Study) -> Chapter:
    surveyed = survey_runs(study)
    if len({each.run.setting for each in surveyed}) == 1:
        return seeds_chapter.write(study, surveyed)
    return settings_chapter.write(study, surveyed)


NO_RUNS = """No other run was compared: `python analyze.py runs=<glob>`, such as `runs='runs/*'` or a sweep's folder,
compares several seeds of one model, or the jobs of a sweep."""

NO_LABELS = """Runs are compared on a test set with known classes, which these images are not."""

NO_INK = """Runs are compared on a test set of digits, by attention to their ink, which these images do not have."""

CHAPTER = ChapterWriter(
    "Comparing runs",
    write,
    ("attention_across_seeds", "attention_across_runs"),
    {Need.SEVERAL_RUNS: NO_RUNS, Need.LABELS: NO_LABELS, Need.INK: NO_INK},
)
