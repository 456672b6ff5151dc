"""What a run and whoever started it say to each other: exit statuses, and the file that tells of an early stop."""

from __future__ import annotations

PREEMPTED = 75
"""Exit status after SIGTERM or SIGUSR1: the run was saved and wants to be started again (EX_TEMPFAIL of sysexits.h)."""

STOPPED_FILE = "MEGATRON_VP2O_STOPPED"
"""Environment variable with the path of a file. Where it is set, a run that was stopped early writes that file and ends
with status 0 in place of PREEMPTED: torchrun takes every other status for a failure, and starts failed ranks again."""
