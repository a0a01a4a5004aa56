# Crystal's recipe at 1.3M parameters on the embedded text, in three stages: `make crystal`.
# Stage 1: prose, half of its documents. Stages 2 and 3 begin with everything that stands here.
hidden_size = 128
intermediate_size = 340  # 8/3 of the width, as Crystal
num_hidden_layers = 4
num_attention_heads = 2
norm = "layernorm"
rms_norm_eps = 1e-5
bias = True
vocab_size = 4096
tie_word_embeddings = True
rotary_dim = 16  # a quarter of the head size 64
rotary_interleaved = True
base_hidden_size = 64  # muP: width scale 1/2
attention_scale_power = 1.0
embedding_scale = 14.6
logit_scale = 2.22
initializer_range = 0.073
init_truncated = True
init_by_depth = True

crystal_tokens = True  # reserved now, for the stages after this
_prose = ("examples", "docstrings", "formulas")
sources = {name: f"data/corpus/{name}.jsonl" for name in ("code", *_prose)}  # tools/corpus.py
source_weights = {"code": 0}  # held out and measured, not trained on
source_halves = dict.fromkeys(_prose, "even")
valid_documents = 12  # of each source one document in 12, the same in all stages
valid_sequences = 64
seq_len = 128
n_chunks = 4
global_batch_size = 16  # sequences = 2048 tokens
micro_batch_size = 16

lr_schedule = "linear"
learning_rate = 0.012
min_learning_rate = 0.00012408
schedule_steps = 2200  # a line that this stage leaves at its end, and stage 2 goes on with
warmup_steps = 50
adam_eps = 1e-9
eval_interval = 85
eval_sequences = 64
keep_train_state = 0
