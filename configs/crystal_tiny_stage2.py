# Stage 2: the other half of the prose, and all of the code twice, most of it for infilling.
from configs.crystal_tiny_stage1 import *  # noqa: F403
from configs.crystal_tiny_stage1 import _prose

tokenizer = "data:data/crystal_tiny_stage1"
init_from = "runs/crystal_tiny_stage1/ckpt_003"
source_weights = {"code": 2}
source_halves = dict.fromkeys(_prose, "odd")
fim_rates = {"code": 0.9}
n_chunks = 8
learning_rate = 0.009
schedule_steps = 0
