"""Meta-reinforcement-learning: a policy that gets better at a new task from its own trajectories.

Environments are gymnasium's (the extra `rl`), policies the library's networks. Not for supervised
tasks, which are in `learn`.
"""
