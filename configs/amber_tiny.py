# 1.9M parameters on the embedded text (python tools/corpus.py writes it): minutes on a laptop CPU.
# Expected at the end: loss about 3.6, 1.50 bits per byte on validation code (tools/report.py).
hidden_size = 128
intermediate_size = 352
num_hidden_layers = 4
num_attention_heads = 2  # head size 64: kinder to CPUs than 32
sources = {
    "code": "data/corpus/code.jsonl",
    "examples": "data/corpus/examples.jsonl",  # docstrings that show a session
    "docstrings": "data/corpus/docstrings.jsonl",
    "formulas": "data/corpus/formulas.jsonl"}
tokenizer = "bpe"  # trained on this text, seconds
vocab_size = 4096
seq_len = 128
n_chunks = 10  # = checkpoints
sequences_per_chunk = 2720  # 170 steps
valid_sequences = 64  # held out of each source
global_batch_size = 16  # sequences = 2048 tokens
micro_batch_size = 16
learning_rate = 3e-3
min_learning_rate = 3e-4
warmup_steps = 50
eval_interval = 85
eval_sequences = 64
keep_train_state = 0  # small enough to keep all
