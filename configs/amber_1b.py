# 1.3B parameters in Amber's recipe: one 8-GPU node, 28B tokens (Chinchilla's 20 per parameter).
# Data: the first 8 of Amber's own chunks.
hidden_size = 2048
intermediate_size = 5504
num_hidden_layers = 24
num_attention_heads = 16  # head size 128, as Amber
tokenized = "data/AmberDatasets/train/train_*.jsonl"
tokenizer = "hf:data/AmberDatasets/tokenizer.json"
n_chunks = 8
global_batch_size = 512  # sequences = 1.05M tokens
micro_batch_size = 8  # about 30 GB on each of 8 GPUs (tools/dry_run.py --world_size=8)
warmup_steps = 1000
eval_interval = 500
