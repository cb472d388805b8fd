"""Where work runs.

local.py      this process: batch after batch of a round
ray.py        the same stages as Ray Data pipelines over pools of actors, on any cluster
pool.py       such a pool
processes.py  many small trainings on this machine, one process for each core
tasks.py      the same as Ray tasks
train.py      one training in several processes of a cluster, by Ray Train
"""
