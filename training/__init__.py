"""Training: from a config to a run that saves, resumes and reports."""
