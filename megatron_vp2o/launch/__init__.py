"""Starting runs elsewhere than in this shell: NeMo-Run experiments on this machine, under torchrun, or under Slurm.

`python -m megatron_vp2o.launch --help` says how. There is no scheduler here: Slurm (or nothing) decides what runs when,
NeMo-Run submits, torchrun starts and restarts the ranks of a job, and Python imports happen where the run is.
"""
