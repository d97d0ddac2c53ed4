"""Studies: a table of models, trained and measured alike, with one command."""

from drt.study.config import StudyConfig, load_study
from drt.study.jobs import Job, plan_jobs, run_job

__all__ = ["Job", "StudyConfig", "load_study", "plan_jobs", "run_job"]
