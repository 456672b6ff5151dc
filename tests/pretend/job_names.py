"""What `job.py` and its tests call the phases of a step; apart, so that tests need not become a process of the device."""

GENERATION, REFRESH, STEP = "generation", "refresh", "step"
ON_CPU = "VP2O_PRETEND_CPU"
"""In the environment of a job that is to run on the CPU instead."""
