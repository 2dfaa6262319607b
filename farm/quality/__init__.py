"""Which edits deserve to be learned from: measures of every edit, the judgement over a concept's edits, and the score
that compares teachers.
"""

from __future__ import annotations

from farm.quality.clip import ClipJudge
from farm.quality.judge import QualityConfig, Verdict, judge, quarantine
from farm.quality.measure import Measures, as_columns, measure, read_measures, write_measures
from farm.quality.score import TeacherScore, choose, score_teacher

__all__ = [
    "ClipJudge",
    "Measures",
    "QualityConfig",
    "TeacherScore",
    "Verdict",
    "as_columns",
    "choose",
    "judge",
    "measure",
    "quarantine",
    "read_measures",
    "score_teacher",
    "write_measures",
]
