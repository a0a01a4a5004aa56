# CrystalCoder 7B, stage 1 of 3 (LLM360, 2023): 6,575,278,720 parameters, 345B tokens.
# Figures: LLM360 crystalcoder-train, params.yaml of each phase; what is derived says so.
# Stages 2 and 3 begin with everything that stands here.
norm = "layernorm"
rms_norm_eps = 1e-5
bias = True
intermediate_size = 10922  # 8/3 of 4096
vocab_size = 32032  # LLaMA's 32000, 22 added, 10 never used
tie_word_embeddings = True
rotary_dim = 32  # of the head size 128
rotary_interleaved = True
base_hidden_size = 256  # muP: width scale 1/16
attention_scale_power = 1.0
embedding_scale = 14.6
logit_scale = 2.22  # x 1/16
initializer_range = 0.073  # hidden x 1/4 = 0.01825; o_proj, down_proj / 8 = 0.00228125
init_truncated = True
init_by_depth = True

tokenizer = "hf:data/CrystalCoder/tokenizer.json"
crystal_tokens = True
# SlimPajama in a folder for each redpajama_set_name, in its natural proportions
sources = {name: f"data/SlimPajama/{name}/*.jsonl.zst" for name in (
    "arxiv", "book", "c4", "commoncrawl", "github", "stackexchange", "wikipedia")}
source_halves = dict.fromkeys(sources, "even")
valid_documents = 5000  # the same documents whatever the stage and the half; ours
seq_len = 2048
n_chunks = 54  # a checkpoint every 1500 steps, and one at the end
sequences_per_chunk = 1500 * 2112
global_batch_size = 2112  # sequences = 4,325,376 tokens
micro_batch_size = 11  # on 192 GPUs; Crystal: 66 on each of 16 CS-2, twice a step

lr_schedule = "linear"
learning_rate = 0.012
min_learning_rate = 0.00012408
warmup_steps = 86
schedule_steps = 86 + 294_337  # one line, that stage 2 goes on with
max_steps = 79_721
adam_eps = 1e-9
eval_interval = 1500
