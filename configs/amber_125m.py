# 134M parameters in Amber's recipe: one consumer GPU, an evening.
hidden_size = 768
intermediate_size = 2048
num_hidden_layers = 12
num_attention_heads = 12  # head size 64
tokenizer = "hf:data/llama/tokenizer.json"  # as Amber; "bpe" trains one instead
sources = {"text": "data/text/*"}  # your text: .txt, .jsonl, .parquet, code, folders
seq_len = 1024
n_chunks = 20
valid_sequences = 512
global_batch_size = 256  # sequences = 262k tokens
micro_batch_size = 16
learning_rate = 6e-4
min_learning_rate = 6e-5
warmup_steps = 500
eval_interval = 250
compile = True
