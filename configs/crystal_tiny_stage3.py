# Stage 3: code, with a little prose.
from configs.crystal_tiny_stage2 import *  # noqa: F403
from configs.crystal_tiny_stage2 import _prose

init_from = "runs/crystal_tiny_stage2/ckpt_007"
source_weights = {"code": 1, **dict.fromkeys(_prose, 0.1)}
source_halves = {}
fim_rates = {"code": 0.3}
n_chunks = 4
learning_rate = 0.002
min_learning_rate = 0.0002
