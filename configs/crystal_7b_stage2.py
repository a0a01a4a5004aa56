# CrystalCoder 7B, stage 2: 927B tokens, the other half of SlimPajama and StarCoder twice.
from configs.crystal_7b_stage1 import *  # noqa: F403
from configs.crystal_7b_stage1 import sources as _pajama

init_from = "runs/crystal_7b_stage1/step_0079721"
sources = {**_pajama, "starcoder": "data/starcoderdata/*/*.parquet"}
source_halves = dict.fromkeys(_pajama, "odd")
source_weights = {"starcoder": 2}
fim_rates = {"starcoder": 0.9}
n_chunks = 143
learning_rate = 0.0087825
min_learning_rate = 0.00013679
warmup_steps = 86
schedule_steps = max_steps = 86 + 214_301
