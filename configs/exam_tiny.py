# Smaller than amber_tiny: seconds to train, for tools/forge.py and tools/examine.py.
hidden_size = 64
intermediate_size = 176
num_hidden_layers = 2
num_attention_heads = 1
sources = {name: f"data/corpus/{name}.jsonl" for name in (  # tools/corpus.py
    "code", "examples", "docstrings", "formulas")}
vocab_size = 1024
seq_len = 64
max_source_bytes = 200_000
n_chunks = 8
sequences_per_chunk = 640  # 40 steps
valid_sequences = 16
global_batch_size = 16
micro_batch_size = 16
learning_rate = 1e-2
min_learning_rate = 1e-3
warmup_steps = 20
eval_sequences = 16
sample_tokens = 0
threads = 1  # several would wait for each other
keep_train_state = 0
