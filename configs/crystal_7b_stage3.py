# CrystalCoder 7B, stage 3: 120B tokens, four languages three times and a little of all.
from configs.crystal_7b_stage2 import *  # noqa: F403
from configs.crystal_7b_stage2 import sources as _before

init_from = "runs/crystal_7b_stage2/step_0214387"
_web = ("css", "html", "javascript", "python")
sources = {**_before, **{name: f"data/starcoderdata/{name}/*.parquet" for name in _web}}
source_halves = {}
# three epochs of the four; of the others what gives Crystal's share of the mixture (derived)
source_weights = {
    **dict.fromkeys(_web, 3), "starcoder": 0.0138, "arxiv": 0.0669, "book": 0.035, "c4": 0.011,
    "commoncrawl": 0.019, "github": 0, "stackexchange": 0.046, "wikipedia": 0.297}
fim_rates = {**dict.fromkeys(_web, 0.3), "starcoder": 0.9}
n_chunks = 28
sequences_per_chunk = 1000 * 2112
learning_rate = 0.002
min_learning_rate = 0.0002
warmup_steps = 276
schedule_steps = max_steps = 276 + 27_452
eval_interval = 1000
