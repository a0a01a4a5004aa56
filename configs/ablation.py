# `make ablation`: amber_tiny on a third of its data, six runs of a minute or less.
from configs.amber_tiny import *  # noqa: F403

n_chunks = 3
min_learning_rate = 1e-4
eval_interval = 0  # at checkpoints only
sample_tokens = 0
