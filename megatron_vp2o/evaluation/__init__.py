"""The paper's evaluation: benchmarks, a results folder, and the tables and figures that come out of it alone.

Importing this loads no torch; models are brought by the composition root (`megatron_vp2o.evaluate`).
"""
